import { memo, useEffect, useId, useState } from "react";
import { CHOICES, conflicts, NUMBERS, parseField, PRESETS, type ChoiceKey, type NumberKey, type Settings } from "../settings";

interface Props {
  settings: Settings;
  onChange: (settings: Settings) => void;
}

const ORDER: NumberKey[] = ["rows", "tile", "chunk", "ioBatch", "miniBatch", "ranks", "workers"];

const WORDS: Record<ChoiceKey, { label: string; help: string; words: Record<string, string> }> = {
  scope: {
    label: "Scope",
    help: "shuffle_scope: among which rows chunks are shuffled",
    words: { partition: "partition (parts apart)", global: "global (whole query)" },
  },
  labelOrder: {
    label: "Labels are stored",
    help: "In the Census, data sets follow each other",
    words: { sorted: "one after the other", random: "in random order" },
  },
  colour: {
    label: "Colour rows by",
    help: "The colour that a row keeps in every step",
    words: { position: "position in the query", tile: "tile", label: "label" },
  },
};

/** Presets, and a field for everything that decides about the order. */
export const Controls = memo(function Controls({ settings, onChange }: Props) {
  return (
    <form className="controls" aria-label="Settings" onSubmit={(event) => event.preventDefault()}>
      <div className="presets" role="group" aria-label="Presets">
        {Object.entries(PRESETS).map(([name, { title, help, settings: preset }]) => (
          <button key={name} type="button" title={help} onClick={() => onChange(preset)}>
            {title}
          </button>
        ))}
      </div>
      <div className="fields">
        {ORDER.map((key) => (
          <NumberInput key={key} name={key} settings={settings} onChange={onChange} />
        ))}
        <Choice name="scope" settings={settings} onChange={onChange} />
        <NumberInput name="seed" settings={settings} onChange={onChange} />
        <NumberInput name="epoch" settings={settings} onChange={onChange} />
        <NumberInput name="labels" settings={settings} onChange={onChange} />
        <Choice name="labelOrder" settings={settings} onChange={onChange} />
        <Choice name="colour" settings={settings} onChange={onChange} />
      </div>
    </form>
  );
});

/** A number: what is typed stays as it is, and counts as soon as it is valid. */
export function NumberInput({ name, settings, onChange }: Props & { name: NumberKey | "seed" }) {
  const id = useId();
  const value = String(settings[name]);
  const [text, setText] = useState(value);
  const [error, setError] = useState<string>();
  useEffect(() => {
    setText(value);
    setError(undefined);
  }, [value, settings]);

  const onInput = (typed: string) => {
    setText(typed);
    const { value: found, error: problem } = parseField(name, typed);
    if (problem !== undefined) return setError(problem);
    const changed = { ...settings, [name]: found } as Settings;
    const conflict = Object.values(conflicts(changed))[0];
    setError(conflict);
    if (conflict === undefined && found !== settings[name]) onChange(changed);
  };
  const field = name === "seed" ? { label: "Seed", help: "The same seed, the same order", python: "seed" } : NUMBERS[name];
  return (
    <div className="field">
      <label htmlFor={id}>
        {field.label} {"python" in field && <code>{field.python}</code>}
      </label>
      <input
        id={id}
        inputMode="decimal"
        autoComplete="off"
        spellCheck={false}
        value={text}
        title={field.help}
        aria-invalid={error !== undefined}
        aria-describedby={error === undefined ? undefined : `${id}-error`}
        onChange={(event) => onInput(event.target.value)}
      />
      {error !== undefined && (
        <p className="error" id={`${id}-error`} role="alert">
          {error}
        </p>
      )}
    </div>
  );
}

function Choice({ name, settings, onChange }: Props & { name: ChoiceKey }) {
  const id = useId();
  const { label, help, words } = WORDS[name];
  return (
    <div className="field">
      <label htmlFor={id}>{label}</label>
      <select
        id={id}
        title={help}
        value={settings[name]}
        onChange={(event) => onChange({ ...settings, [name]: event.target.value } as Settings)}
      >
        {CHOICES[name].map((choice) => (
          <option key={choice} value={choice}>
            {words[choice]}
          </option>
        ))}
      </select>
    </div>
  );
}
