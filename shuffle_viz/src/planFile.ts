/** Reads what `tiledbsoma-ml plan URI --json` wrote; `docs/plan_format.md` tells the format. */

import { EVERY, inTurn, NOBODY, StepBuilder, tilesOf, type Epoch } from "./order/epoch";

export interface PlanFile {
  epoch: Epoch;
  name: string;
  /** In a few words: what it is the plan of. */
  caption: string;
  /** Rows of the query; more than are listed, where the plan was bounded. */
  nRows: number;
  isWhole: boolean;
  chunk: number;
  ioBatch: number;
  miniBatch: number;
}

const MOST_LISTED = 200_000;

interface Piece {
  n_rows: number;
  obs_joinids: number[];
}

interface Part {
  rank: number;
  worker: number;
  chunks: Piece[];
  io_batches: Piece[];
  mini_batches: number[][];
}

/** Read a plan. Throws an Error with a sentence for the user where it is broken. */
export function readPlan(text: string, name: string): PlanFile {
  const plan = parsed(text);
  const fields = object(plan, "the file");
  if (fields["format"] !== "tiledbsoma-ml plan") {
    throw new Error(`“format” must be "tiledbsoma-ml plan"; write a plan with: tiledbsoma-ml plan URI --json`);
  }
  if (fields["format_version"] !== 1) {
    throw new Error(`“format_version” must be 1, not ${JSON.stringify(fields["format_version"])}; this page reads no other.`);
  }
  const settings = object(fields["settings"], "settings");
  const tile = count(fields["row_tile"], "row_tile", 1);
  const scope = settings["shuffle_scope"];
  if (scope !== "partition" && scope !== "global") throw new Error(`“settings.shuffle_scope” must be "partition" or "global".`);
  const parts = list(fields["parts"], "parts").map(readPart);
  const listed = [...new Set(parts.flatMap((part) => part.mini_batches.flat()))].sort((a, b) => a - b);
  if (listed.length === 0) throw new Error("“parts” must list at least one row.");
  if (listed.length > MOST_LISTED) {
    throw new Error(`the plan lists ${listed.length.toLocaleString("en")} rows, and ${MOST_LISTED.toLocaleString("en")} can be drawn; write it with --limit ${MOST_LISTED}.`);
  }
  const nRows = count(fields["n_rows"], "n_rows", 1);
  const sizes = object(fields["sizes"], "sizes");
  return {
    epoch: {
      nRows: listed.length,
      tile,
      joinids: Float64Array.from(listed),
      steps: stepsOf(parts, listed, tile),
      scope,
      ranks: count(settings["world_size"], "settings.world_size", 1),
      workers: count(settings["num_workers"], "settings.num_workers", 0),
      nChunks: parts.reduce((n, part) => n + part.chunks.length, 0),
    },
    name,
    caption: String(settings["uri"] ?? name),
    nRows,
    isWhole: fields["is_whole"] === true,
    chunk: count(sizes["chunk_rows"], "sizes.chunk_rows", 1),
    ioBatch: count(sizes["io_batch_rows"], "sizes.io_batch_rows", 1),
    miniBatch: count(settings["batch_size"], "settings.batch_size", 1),
  };
}

function stepsOf(parts: readonly Part[], listed: readonly number[], tile: number): Epoch["steps"] {
  const rowOf = new Map(listed.map((joinid, row) => [joinid, row]));
  const rows = (joinids: readonly number[], where: string) =>
    Int32Array.from(joinids, (joinid) => {
      const row = rowOf.get(joinid);
      if (row === undefined) throw new Error(`row ${joinid} of “${where}” is in no mini-batch; write the plan anew.`);
      return row;
    });
  const size = (pieces: readonly { length: number }[]) => pieces.reduce((n, piece) => n + piece.length, 0);
  const total = (of: (part: Part) => readonly { length: number }[]) => size(parts.map(of).map((pieces) => ({ length: size(pieces) })));
  const chunks = new StepBuilder(total((part) => part.chunks.map((piece) => piece.obs_joinids)));
  const ioBatches = new StepBuilder(total((part) => part.io_batches.map((piece) => piece.obs_joinids)));
  const miniBatches = new StepBuilder(total((part) => part.mini_batches));
  for (const part of parts) {
    chunks.band(part.rank, part.worker);
    for (const { obs_joinids } of part.chunks) chunks.group(rows(obs_joinids, "chunks"), part.rank, part.worker);
    ioBatches.band(part.rank, part.worker);
    for (const { obs_joinids } of part.io_batches) ioBatches.group(rows(obs_joinids, "io_batches"), part.rank, part.worker);
  }
  for (const rank of [...new Set(parts.map((part) => part.rank))].sort((a, b) => a - b)) {
    miniBatches.band(rank, EVERY);
    const ofWorkers = parts
      .filter((part) => part.rank === rank)
      .map((part) => part.mini_batches.map((joinids) => ({ rows: rows(joinids, "mini_batches"), worker: part.worker })));
    for (const { rows: found, worker } of inTurn(ofWorkers)) miniBatches.group(found, rank, worker);
  }
  return {
    query: tilesOf(listed.length, (row) => Math.floor(listed[row] / tile)),
    chunks: chunks.done(),
    ioBatches: ioBatches.done(),
    miniBatches: miniBatches.done(),
  };
}

function readPart(value: unknown, k: number): Part {
  const where = `parts[${k}]`;
  const part = object(value, where);
  const pieces = (name: string) =>
    list(part[name], `${where}.${name}`).map((piece, i) => {
      const { n_rows, obs_joinids } = object(piece, `${where}.${name}[${i}]`);
      return {
        n_rows: count(n_rows, `${where}.${name}[${i}].n_rows`, 0),
        obs_joinids: joinids(obs_joinids, `${where}.${name}[${i}].obs_joinids`),
      };
    });
  return {
    rank: count(part["rank"], `${where}.rank`, NOBODY + 1),
    worker: count(part["worker"], `${where}.worker`, 0),
    chunks: pieces("chunks"),
    io_batches: pieces("io_batches"),
    mini_batches: list(part["mini_batches"], `${where}.mini_batches`).map((batch, i) => joinids(batch, `${where}.mini_batches[${i}]`)),
  };
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON; write a plan with: tiledbsoma-ml plan URI --json > plan.json");
  }
}

function object(value: unknown, where: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(`“${where}” must be an object.`);
  return value as Record<string, unknown>;
}

function list(value: unknown, where: string): unknown[] {
  if (!Array.isArray(value)) throw new Error(`“${where}” must be a list.`);
  return value;
}

function count(value: unknown, where: string, least: number): number {
  if (!Number.isSafeInteger(value) || (value as number) < least) {
    throw new Error(`“${where}” must be a whole number of at least ${least}, not ${JSON.stringify(value) ?? "missing"}.`);
  }
  return value as number;
}

function joinids(value: unknown, where: string): number[] {
  return list(value, where).map((joinid, i) => count(joinid, `${where}[${i}]`, 0));
}
