"""Models of scvi-tools that were trained with a data module: how they are loaded, and get new batches."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tiledbsoma_ml._common import absolute_path, check_bool

MODEL_FILE = "model.pt"

NO_COLUMN = ("_scvi_batch", "_scvi_labels")
"""Columns that a registry of scvi-tools names where cells in memory had no column of batches or labels."""


def load_scvi_model(
    model_class: Any,
    dir_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    prefix: str = "",
) -> Any:
    """Return a model that `model.save(dir_path, datamodule=…)` has saved, exactly as it was.

    The `load` of scvi-tools builds the network from a few numbers that were saved beside it. It fails, or
    silently builds another network, where the model has several categorical covariates or options of the
    network (`encode_covariates`, `use_layer_norm`, …). This function builds the network from the registry and
    the options that it was first built from. It needs no data module.

    Args:
        model_class: `SCVI`, `SCANVI` or another class that takes a registry.
        dir_path: The folder where the model was saved.
        device: The device to put the model on.
        prefix: The prefix that `save` was given.

    Raises:
        ValueError: If there is no such model.
    """
    saved = read_saved(dir_path, prefix)
    attributes = saved["attr_dict"]
    model = _build(model_class, attributes["registry_"], attributes, attributes.get("labels_"))
    _set_attributes(model, attributes)
    _load_weights(model, saved["model_state_dict"])
    model.to_device(torch.device(device))
    model.module.eval()
    return model


def load_query_model(
    model_class: Any,
    reference: Any,
    datamodule: Any,
    *,
    device: str | torch.device = "cpu",
    unfrozen: bool = False,
    freeze_dropout: bool = False,
    freeze_expression: bool = True,
    freeze_decoder_first_layer: bool = True,
    freeze_batchnorm_encoder: bool = True,
    freeze_batchnorm_decoder: bool = False,
    freeze_classifier: bool = True,
) -> Any:
    """Return a copy of a trained model with room for the new batches of a data module, to be trained on it.

    This is scArches (Lotfollahi et al. 2021): training changes only the weights that new batches add, unless
    `unfrozen`. Before it, cells of the old batches have the same latent space as in the trained model.

    The `load_query_data` of scvi-tools adds no batches for a data module. For an AnnData with covariates, it
    puts the weights of new batches behind those of the covariates.

    Args:
        model_class: `SCVI` or `SCANVI`.
        reference: The trained model, or the folder where it was saved.
        datamodule: `SCVIDataModule(query, reference=reference, unseen="extend")`.
        device: The device to put the copy on.
        unfrozen: Whether to train all weights; the options below do not matter then.
        freeze_dropout: Whether to train without dropout.
        freeze_expression: Whether to keep what the first layers of encoders make of genes.
        freeze_decoder_first_layer: Whether to keep what the first layer of the decoder makes of its input.
        freeze_batchnorm_encoder: Whether to keep batch normalization in encoders.
        freeze_batchnorm_decoder: Whether to keep batch normalization in the decoder.
        freeze_classifier: Whether to keep the classifier of `SCANVI`.

    Raises:
        ValueError: If the data module has other genes or categories than the model.
    """
    model = _with_room(model_class, _saved_of(reference), datamodule)
    model.to_device(torch.device(device))
    model.module.eval()
    _freeze(
        model.module,
        unfrozen=unfrozen,
        freeze_dropout=freeze_dropout,
        freeze_expression=freeze_expression,
        freeze_decoder_first_layer=freeze_decoder_first_layer,
        freeze_batchnorm_encoder=freeze_batchnorm_encoder,
        freeze_batchnorm_decoder=freeze_batchnorm_decoder,
        freeze_classifier=freeze_classifier,
    )
    model.is_trained_ = False
    return model


def read_saved(dir_path: str | os.PathLike[str], prefix: str = "") -> dict[str, Any]:
    """Return what `model.save` wrote: "model_state_dict", "var_names" and "attr_dict"."""
    path = absolute_path(dir_path, "dir_path") / f"{prefix}{MODEL_FILE}"
    if not path.is_file():
        raise ValueError(
            f"dir_path={str(dir_path)!r} must hold a model of scvi-tools, but there is no {path.name}; "
            "give the folder that `model.save` was given."
        )
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return saved


def registry_of(reference: Any) -> Mapping[str, Any]:
    """Return the registry of a model, of the folder where one was saved, or a registry as it is.

    Raises:
        ValueError: If the model has none.
    """
    if isinstance(reference, Mapping):
        return reference
    if isinstance(reference, str | os.PathLike):
        registry: Mapping[str, Any] = read_saved(reference)["attr_dict"]["registry_"]
        return registry
    known: Mapping[str, Any] | None = getattr(reference, "registry_", None)
    if known is None:
        raise ValueError(
            f"the model must have a registry, but this {type(reference).__name__} was made without one and "
            "not trained with an SCVIDataModule; make it with registry=datamodule.registry."
        )
    return known


def attach(model: Any, datamodule: Any) -> None:
    """Prepare a model that is trained with a data module to be saved and embedded, whatever it was made of.

    The `save` of scvi-tools needs the data module, and callbacks that call it in training do not pass it. A
    model that was made without a registry gets that of the data module, as its constructor would have.
    """
    from scvi.data import AnnDataManager

    model.save = partial(type(model).save, model, datamodule=datamodule)
    if getattr(model, "registry_", None) is None:
        model.registry_ = datamodule.registry
        model.summary_stats = AnnDataManager._get_summary_stats_from_registry(model.registry_)
        model._adata = model._adata_manager = None


def check_monitors(trainer: Any) -> None:
    """Raise a ValueError if a callback or a scheduler waits for a metric of validation."""
    watched = [(type(each).__name__, getattr(each, "monitor", None)) for each in trainer.callbacks]
    if getattr(trainer.lightning_module, "reduce_lr_on_plateau", False):
        watched.append(("reduce_lr_on_plateau", trainer.lightning_module.lr_scheduler_metric))
    for name, metric in watched:
        if metric is not None and "validation" in metric:
            raise ValueError(
                f"{name} waits for {metric!r}, but train_size=1 leaves no cells for validation; "
                "make the data module with train_size=0.9."
            )


def n_batches_of(registry: Mapping[str, Any]) -> int:
    """Return how many batches a registry knows."""
    return len(_names(registry, "batches"))


def check_fits(model: Mapping[str, Any], module: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the registries of a model and a data module have the same genes and codes.

    One of them may know more batches than the other.
    """
    for what in ("genes", "batches", "labels"):
        ours, theirs = _names(module, what), _names(model, what)
        n_common = min(len(ours), len(theirs)) if what == "batches" else None
        if ours[:n_common] != theirs[:n_common]:
            raise ValueError(
                f"the {what} of the data module ({len(ours):,}) must be the model's ({len(theirs):,}), in "
                "the same order, new batches last; make it with SCVIDataModule(query, reference=model)."
            )


def _names(registry: Mapping[str, Any], what: str) -> list[str]:
    fields = registry["field_registries"]
    if what == "genes":
        return list(fields["X"]["state_registry"]["column_names"])
    state = fields["batch" if what == "batches" else "labels"]["state_registry"]
    if not state.get("column_names", state["original_key"] not in NO_COLUMN):
        return ["all"]
    return [name for name in state["categorical_mapping"] if name != state.get("unlabeled_category")]


class _LabelsOnly:
    """The attributes of a data module that a semi-supervised model reads when it is built."""

    def __init__(self, registry: Mapping[str, Any], labels: Any) -> None:
        self.registry = registry
        self.labels_ = labels


def _saved_of(reference: Any) -> dict[str, Any]:
    if isinstance(reference, str | os.PathLike):
        return read_saved(reference)
    registry_of(reference)
    names = [name for name in vars(reference) if name.endswith("_") and not name.endswith("__")]
    attributes = {name: getattr(reference, name) for name in names}
    return {"model_state_dict": reference.module.state_dict(), "attr_dict": attributes}


def _build(model_class: Any, registry: Mapping[str, Any], attributes: Mapping[str, Any], labels: Any) -> Any:
    """Return a model with fresh weights, built from the options of `attributes`."""
    options = attributes["init_params_"]
    named = dict(options["non_kwargs"])
    for extra in options["kwargs"].values():
        named |= extra
    named.pop("datamodule", None)  # scvi-tools' own `load_query_data` leaves it there, for `SCVI` too
    if "datamodule" in inspect.signature(model_class).parameters:
        named["datamodule"] = _LabelsOnly(registry, labels)
    return model_class(registry=registry, **named)


def _set_attributes(model: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if name.endswith("_") and name not in ("init_params_", "registry_"):
            setattr(model, name, value)


def _load_weights(model: Any, weights: Mapping[str, Any]) -> None:
    model.module.load_state_dict(
        {name: value for name, value in weights.items() if name != "pyro_param_store"}
    )


# Room for new batches -------------------------------------------------------------------------------------


def _with_room(model_class: Any, saved: Mapping[str, Any], datamodule: Any) -> Any:
    """Return a saved model with room for the batches of a data module."""
    attributes = saved["attr_dict"]
    check_fits(attributes["registry_"], datamodule.registry)
    if datamodule.n_batch < n_batches_of(attributes["registry_"]):
        raise ValueError(
            f"the data module must know all batches of the model, but knows {datamodule.n_batch:,} only; "
            "make it with SCVIDataModule(query, reference=model)."
        )
    model = _build(model_class, datamodule.registry, attributes, datamodule.labels_)
    old = _build(model_class, attributes["registry_"], attributes, attributes.get("labels_"))
    _load_weights(old, saved["model_state_dict"])
    model.module.load_state_dict(_extended(old.module, model.module, old.summary_stats.n_batch))
    return model


def _freeze(module: Any, **options: bool) -> None:
    """Keep all weights from being trained but those of new batches, as far as options say."""
    from scvi.model.base._archesmixin import _set_params_online_update

    _set_params_online_update(module, **{name: check_bool(name, value) for name, value in options.items()})


def _extended(old: Any, new: Any, n_batch: int) -> dict[str, torch.Tensor]:
    """Return the weights of `old` in the shapes of `new`, which knows more batches.

    Where categories are inputs of a layer, batches come first and covariates after them, so new columns
    belong in between. Everywhere else the batches are the end of a dimension.
    """
    from scvi.nn import FCLayers

    weights, fresh = dict(old.state_dict()), new.state_dict()
    layers = {name: module for name, module in old.named_modules() if isinstance(module, FCLayers)}
    for name, target in fresh.items():
        layer = next((layer for prefix, layer in layers.items() if name.startswith(f"{prefix}.")), None)
        behind = 0 if layer is None else sum(layer.n_cat_list[1:])
        weights[name] = _padded(weights[name], target, behind, n_batch)
    return weights


def _padded(old: torch.Tensor, new: torch.Tensor, behind: int, n_batch: int) -> torch.Tensor:
    """Return `old` in the shape of `new`; what is new stands before the last `behind` columns."""
    for dim, (have, want) in enumerate(zip(old.shape, new.shape, strict=True)):
        if have == want:
            continue
        first = have - behind
        added = new.narrow(dim, first, want - have).clone()
        if want - have > 1 and n_batch == 1:
            added.narrow(dim, 0, 1).zero_()  # the one batch had no column: its cells stay where they were
        old = torch.cat([old.narrow(dim, 0, first), added, old.narrow(dim, first, behind)], dim)
    return old
