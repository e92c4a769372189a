from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from layer_tables import (
    SMALL_PAGES,
    assert_same_bits,
    put_together,
    random_layer,
    rows_of_counts,
    store_in,
)
from tiledbsoma_ml._soma.held_rows import HeldRows
from tiledbsoma_ml._soma.stores import Extents, Pages

# Pages ----------------------------------------------------------------------------------------------------


class CountedPages(Pages):
    """Small pages that tell how often each was taken, and how many are out."""

    def __init__(self) -> None:
        super().__init__(**SMALL_PAGES)
        self.times_taken: Counter[int] = Counter()
        self.out: dict[int, NDArray[np.uint8]] = {}

    def take(self) -> NDArray[np.uint8]:
        page = super().take()
        assert page.ctypes.data not in self.out
        self.out[page.ctypes.data] = page
        self.times_taken[page.ctypes.data] += 1
        return page

    def give_back(self, page: NDArray[np.uint8]) -> None:
        del self.out[page.ctypes.data]
        super().give_back(page)


def test_a_page_that_was_given_back_is_used_again() -> None:
    pages = Pages()
    page, other = pages.take(), pages.take()
    pages.give_back(page)
    assert pages.take() is page
    pages.give_back(other)
    pages.give_back(page)
    assert {id(pages.take()), id(pages.take())} == {id(page), id(other)}


def test_pages_that_are_out_at_once_have_no_byte_in_common() -> None:
    pages = Pages(page_bytes=2**10, slab_bytes=2**13)
    starts = sorted(page.ctypes.data for page in [pages.take() for _ in range(17)])  # of three slabs
    assert (np.diff(starts) >= 2**10).all()
    assert {len(pages.take()) for _ in range(3)} == {pages.page_bytes} == {2**10}


def test_a_page_is_never_handed_to_two_threads_at_once() -> None:
    pages = Pages()

    def use(number: int) -> None:
        for _ in range(300):
            mine = [pages.take() for _ in range(3)]
            for page in mine:
                page[:64] = number
            for page in mine:
                assert (page[:64] == number).all()
                pages.give_back(page)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_window_gives_its_pages_back_part_by_part_and_the_next_one_uses_them() -> None:
    pages = CountedPages()
    parts = iter(random_layer(0).filled(n_pieces=6, store=pages))
    n_out = [len(pages.out)] + [len(pages.out) for _ in parts]
    assert n_out == sorted(n_out, reverse=True)
    assert len(set(n_out)) == len(n_out)
    assert n_out[-1] == 0
    n_pages = len(pages.times_taken)
    for seed in (0, 0):
        assert list(random_layer(seed).filled(n_pieces=6, store=pages))
    assert len(pages.times_taken) <= -(-n_pages // 4) * 4  # a slab is of four
    assert max(pages.times_taken.values()) > 1


def test_a_window_that_is_filled_while_another_is_given_out_leaves_its_rows_alone() -> None:
    first, other = random_layer(1), random_layer(2)
    pages = CountedPages()
    parts, later = iter(first.filled(n_pieces=5, store=pages)), other.window(n_pieces=5, store=pages)
    given_out = []
    for table in other.tables:
        given_out.append(next(parts))
        later.add(*table)
    assert_same_bits(put_together(given_out), first.dense())
    assert_same_bits(put_together(list(later)), other.dense())


@pytest.mark.parametrize("n_taken", [0, 2])
def test_pages_of_rows_that_are_not_given_out_to_the_end_are_used_again(n_taken: int) -> None:
    pages = CountedPages()
    leave_early(random_layer(0).filled(n_pieces=6, store=pages), n_taken)
    assert not pages.out
    n_bytes = pages.nbytes
    assert list(random_layer(0).filled(n_pieces=6, store=pages))
    assert pages.nbytes == n_bytes


def test_all_of_a_process_share_the_pages_of_a_size_as_long_as_one_of_them_is_there() -> None:
    store = Pages.shared(2**11)
    assert Pages.shared(2**11) is store
    assert Pages.shared(2**10) is not store
    assert pickle.loads(pickle.dumps({2**11: store})) == {2**11: store}
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None


# Files ----------------------------------------------------------------------------------------------------


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux")


def open_files(folder: Path) -> list[int]:
    """Return the sizes of the open files that were made in a folder, whether they have a name or not."""
    sizes = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).startswith(f"{folder}/"):
                sizes.append(link.stat().st_size)
        except FileNotFoundError:  # the listing itself
            continue
    return sizes


def test_no_file_has_a_name_at_any_moment(tmp_path: Path) -> None:
    seen = []

    def spied(method: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            seen.append(list(tmp_path.iterdir()))
            result = method(*args)
            seen.append(list(tmp_path.iterdir()))
            return result

        return spy

    layer = random_layer(3)
    with mock.patch.multiple(
        Extents, __init__=spied(Extents.__init__), write=spied(Extents.write), read=spied(Extents.read)
    ):
        for part in layer.filled(n_pieces=4, store=store_in(tmp_path)):
            assert len(part)
            seen.append(list(tmp_path.iterdir()))
    assert len(seen) > 20
    assert not any(seen)


@needs_proc
def test_windows_of_many_parts_need_one_file_however_few_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    layers = [random_layer(seed) for seed in range(3)]
    store = Extents(tmp_path, 2**12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        windows = [layer.filled(n_pieces=200, store=store) for layer in layers]
        assert len(open_files(tmp_path)) == 1
        for layer, window in zip(layers, windows, strict=True):
            assert_same_bits(put_together(list(window)), layer.dense())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_proc
def test_the_space_of_a_part_is_used_again_once_it_was_taken(tmp_path: Path) -> None:
    n_pieces, layers = 5, [random_layer(seed) for seed in range(4)]
    store = Extents(tmp_path, 2**12)
    windows = [layer.filled(n_pieces=n_pieces, store=store) for layer in layers[:2]]
    [at_first] = open_files(tmp_path)
    n_bytes = sum(window.nbytes for window in windows)
    assert n_bytes - 2 * n_pieces * 2**11 < at_first < n_bytes + 2 * n_pieces * 2**12
    for number, layer in enumerate(layers):
        assert_same_bits(put_together(list(windows[number])), layer.dense())
        if number + 2 < len(layers):
            windows.append(layers[number + 2].filled(n_pieces=n_pieces, store=store))
    [at_last] = open_files(tmp_path)
    assert at_last < at_first + n_bytes / 10  # windows differ a little


def test_a_disk_that_becomes_full_is_told_with_its_folder(tmp_path: Path) -> None:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    rule = f"window_dir='{tmp_path}' must take .*, but: No space left on device; choose another folder, or"
    with mock.patch.object(os, "pwrite", full), pytest.raises(OSError, match=rule) as raised:
        random_layer(5).filled(n_pieces=3, store=store_in(tmp_path))
    assert raised.value.errno == errno.ENOSPC


def test_an_operating_system_that_writes_and_reads_less_than_asked_for_is_asked_again(tmp_path: Path) -> None:
    pwrite, preadv, layer = os.pwrite, os.preadv, random_layer(5)
    with (
        mock.patch.object(os, "pwrite", lambda file, data, start: pwrite(file, data[:999], start)),
        mock.patch.object(os, "preadv", lambda file, into, start: preadv(file, [into[0][:777]], start)),
    ):
        window = layer.filled(n_pieces=3, store=store_in(tmp_path))
        assert_same_bits(put_together(list(window)), layer.dense())


@needs_proc
@pytest.mark.parametrize("n_taken", [0, 2])
def test_files_of_a_window_that_is_not_used_up_are_closed_with_it(tmp_path: Path, n_taken: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the next test is about those
        leave_early(random_layer(6).filled(n_pieces=5, store=store_in(tmp_path)), n_taken)
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("n_taken", [0, 2])
def test_nothing_complains_about_a_window_that_is_not_used_up(tmp_path: Path, n_taken: int) -> None:
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always", ResourceWarning)
        leave_early(random_layer(6).filled(n_pieces=5, store=store_in(tmp_path)), n_taken)
    assert [str(warning.message) for warning in complaints] == []


def leave_early(window: HeldRows, n_taken: int) -> None:
    parts = iter(window)
    for _ in range(n_taken):
        next(parts)
    del parts, window
    gc.collect()


def test_a_folder_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        rows_of_counts(3).filled(store=store_in(tmp_path / "gone"))
