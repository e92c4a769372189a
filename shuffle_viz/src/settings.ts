/** What can be set, its rules, and how the address of the page holds it. */

import type { Setup, Scope } from "./order/epoch";
import type { LabelOrder } from "./order/quality";

export type Colour = "position" | "tile" | "label";

export interface Settings extends Setup {
  labels: number;
  labelOrder: LabelOrder;
  colour: Colour;
  /** The query of the trade-off: rows, non-zeros a row, GiB for "auto", ns to scan a non-zero. */
  query: number;
  nonZeros: number;
  budget: number;
  scanNs: number;
}

export type Key = keyof Settings;

export const MOST_ROWS = 100_000;

interface NumberField {
  label: string;
  python?: string;
  help: string;
  least: number;
  most: number;
  try: number;
  isWhole: boolean;
}

function whole(label: string, least: number, most: number, tryThis: number, help: string, python?: string): NumberField {
  return { label, least, most, try: tryThis, help, isWhole: true, ...(python ? { python } : {}) };
}

/** Fields that hold numbers. */
export const NUMBERS = {
  rows: whole("Rows", 1, MOST_ROWS, 1000, "Rows of the query that is drawn, all of them neighbours"),
  chunk: whole("Chunk", 1, MOST_ROWS, 64, "Neighbouring rows that stay together until they are read", "shuffle_chunk_size"),
  ioBatch: whole("IO batch", 1, 10_000_000, 65_536, "Rows read together: the shuffle window", "io_batch_size"),
  miniBatch: whole("Mini-batch", 1, MOST_ROWS, 1024, "Rows that the model gets at once", "batch_size"),
  tile: whole("Tile", 1, MOST_ROWS, 2048, "Neighbouring rows that TileDB decodes together"),
  ranks: whole("Ranks", 1, 64, 1, "Training processes, one for each GPU", "world_size"),
  workers: whole("Workers", 0, 16, 0, "Reading processes of each rank; 0: it reads itself", "num_workers"),
  epoch: whole("Epoch", 0, 1e12, 0, "Every epoch has a new order"),
  labels: whole("Labels", 1, 900, 900, "Data sets, donors or cell types, of very different sizes"),
  query: whole("Rows of your query", 1, 1e9, 20_000_000, "In the trade-off below"),
  nonZeros: whole("Non-zeros a row", 1, 100_000, 1560, "Stored values of a cell"),
  budget: { label: "Memory, GiB", help: "memory_budget", least: 0.0625, most: 4096, try: 2, isWhole: false, python: "memory_budget" },
  scanNs: { label: "Scan, ns a non-zero", help: "TileDB reading whole tiles", least: 0.1, most: 10_000, try: 19, isWhole: false },
} satisfies Partial<Record<Key, NumberField>>;

export type NumberKey = keyof typeof NUMBERS;

/** Fields that hold one of a few words. */
export const CHOICES = {
  scope: ["partition", "global"] satisfies Scope[],
  labelOrder: ["sorted", "random"] satisfies LabelOrder[],
  colour: ["position", "tile", "label"] satisfies Colour[],
} as const;

export type ChoiceKey = keyof typeof CHOICES;

const LARGEST_SEED = 2n ** 128n - 1n;

const SMALL: Settings = {
  rows: 64,
  chunk: 4,
  ioBatch: 16,
  miniBatch: 4,
  tile: 8,
  ranks: 1,
  workers: 0,
  scope: "partition",
  seed: 0n,
  epoch: 0,
  labels: 4,
  labelOrder: "sorted",
  colour: "position",
  query: 20_000_000,
  nonZeros: 1560,
  budget: 2,
  scanNs: 19,
};

export const CENSUS: Settings = {
  ...SMALL,
  rows: 100_000,
  chunk: 64,
  ioBatch: 65_536,
  miniBatch: 1024,
  tile: 2048,
  labels: 900,
};

export const PRESETS: Record<string, { title: string; help: string; settings: Settings }> = {
  census: { title: "Census-like", help: "100,000 rows with the default sizes, in tiles of 2,048 as the CELLxGENE Census has them", settings: CENSUS },
  small: { title: "Small", help: "64 rows: small enough to follow by hand", settings: SMALL },
  ranks: {
    title: "Ranks and workers",
    help: "2 ranks with 2 workers each",
    settings: { ...SMALL, ranks: 2, workers: 2, rows: 66 },
  },
  gpus: {
    title: "8 GPUs, global",
    help: "The same on 8 ranks, each of which sees all of the query",
    settings: { ...CENSUS, ranks: 8, scope: "global" },
  },
};

/** What a field holds as text, and whether that is a value. */
export type Checked = { value: number | bigint; error?: undefined } | { value?: undefined; error: string };

/** Read what was typed into a field; the error tells the rule and a way out. */
export function parseField(key: NumberKey | "seed", text: string): Checked {
  const plain = text.trim().replace(/(\d)[,_\s](?=\d{3})/g, "$1");
  if (key === "seed") {
    if (!/^\d{1,39}$/.test(plain) || BigInt(plain) > LARGEST_SEED) {
      return { error: `Seed must be a whole number from 0 to 2^128 - 1, not “${text}”; try 0.` };
    }
    return { value: BigInt(plain) };
  }
  const { label, least, most, isWhole, try: tryThis } = NUMBERS[key];
  const value = /^-?\d+(\.\d+)?(e\d+)?$/.test(plain) ? Number(plain) : NaN;
  if (Number.isNaN(value) || (isWhole && !Number.isInteger(value)) || value < least || value > most) {
    const kind = isWhole ? "a whole number" : "a number";
    const range = `from ${least.toLocaleString("en")} to ${most.toLocaleString("en")}`;
    return { error: `${label} must be ${kind} ${range}, not “${text}”; try ${tryThis.toLocaleString("en")}.` };
  }
  return { value };
}

/** Return what is wrong between two fields, by the field that should be mended. */
export function conflicts(settings: Settings): Partial<Record<Key, string>> {
  const { ioBatch, chunk } = settings;
  if (ioBatch % chunk === 0) return {};
  const next = Math.ceil(ioBatch / chunk) * chunk;
  return {
    ioBatch: `IO batch ${ioBatch.toLocaleString("en")} must be a multiple of the chunk, ${chunk.toLocaleString("en")}; try ${next.toLocaleString("en")}.`,
  };
}

export interface Address {
  settings: Settings;
  /** The mini-batch that is looked at, from 1; 0 for the whole epoch. */
  at: number;
  /** The row that is followed. */
  row: number | null;
  /** What could not be read, one sentence each. */
  problems: string[];
}

/** Return the part of the address, behind "#", that holds all of this. */
export function toAddress(settings: Settings, at: number, row: number | null): string {
  const parameters = new URLSearchParams();
  for (const [key, value] of Object.entries(settings)) parameters.set(key, String(value));
  if (at > 0) parameters.set("at", String(at));
  if (row !== null) parameters.set("row", String(row));
  return `#${parameters}`;
}

/** Read an address; what is missing or broken is as in the Census-like example. */
export function fromAddress(hash: string): Address {
  const parameters = new URLSearchParams(hash.replace(/^#/, ""));
  const settings: Settings = { ...CENSUS };
  const problems: string[] = [];
  for (const [key, text] of parameters) {
    if (key in NUMBERS || key === "seed") {
      const { value, error } = parseField(key as NumberKey | "seed", text);
      if (error === undefined) Object.assign(settings, { [key]: value });
      else problems.push(error);
    } else if (key in CHOICES) {
      const choices: readonly string[] = CHOICES[key as ChoiceKey];
      if (choices.includes(text)) Object.assign(settings, { [key]: text });
      else problems.push(`${key} must be one of ${choices.join(", ")}, not “${text}”.`);
    }
  }
  const conflict = conflicts(settings).ioBatch;
  if (conflict) {
    problems.push(conflict);
    settings.ioBatch = Math.ceil(settings.ioBatch / settings.chunk) * settings.chunk;
  }
  const row = readPlace(parameters.get("row"));
  return {
    settings,
    at: readPlace(parameters.get("at")) ?? 0,
    row: row !== null && row < settings.rows ? row : null,
    problems,
  };
}

function readPlace(text: string | null): number | null {
  return text !== null && /^\d{1,9}$/.test(text) ? Number(text) : null;
}
