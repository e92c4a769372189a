/**
 * The order of an epoch, by the rules of `tiledbsoma_ml`: which rows are read together, and who yields which.
 *
 * `tests/golden.test.ts` compares it with what Python yields.
 */

import { Generator } from "./random";

export type Scope = "partition" | "global";

/** What decides about the order; sizes are in rows, as `ExperimentDataset` has them. */
export interface Setup {
  rows: number;
  chunk: number;
  ioBatch: number;
  miniBatch: number;
  ranks: number;
  /** As a DataLoader has them: with 0, the training process itself reads. */
  workers: number;
  scope: Scope;
  seed: bigint;
  epoch: number;
  tile: number;
}

/** One of the four steps: rows put one after the other, in groups, and these in bands. */
export interface Step {
  /** The row at each place. */
  rows: Int32Array;
  /** The place at which each group starts; and the end of the last one. */
  starts: Int32Array;
  /** Who reads each group: a rank and a worker; NOBODY, or EVERY of its workers. */
  rank: Int32Array;
  worker: Int32Array;
  bands: Band[];
}

/** Groups that belong to one rank or worker: they are drawn on lines of their own. */
export interface Band {
  firstGroup: number;
  rank: number;
  worker: number;
}

export const NOBODY = -1;
export const EVERY = -2;

export const STEP_NAMES = ["query", "chunks", "ioBatches", "miniBatches"] as const;
export type StepName = (typeof STEP_NAMES)[number];

export interface Epoch {
  nRows: number;
  tile: number;
  /** The joinid of each row. */
  joinids: Float64Array;
  steps: Record<StepName, Step>;
  scope: Scope;
  ranks: number;
  workers: number;
  /** Chunks of the whole epoch, over all ranks and workers. */
  nChunks: number;
}

/** Return the order of an epoch. */
export function orderOf(setup: Setup): Epoch {
  const dealt = setup.scope === "global" ? dealGlobally(setup) : dealByPart(setup);
  return {
    nRows: setup.rows,
    tile: setup.tile,
    joinids: Float64Array.from({ length: setup.rows }, (_, row) => row),
    steps: { query: tilesOf(setup.rows, (row) => Math.floor(row / setup.tile)), ...dealt },
    scope: setup.scope,
    ranks: setup.ranks,
    workers: setup.workers,
    nChunks: setup.scope === "global" ? Math.ceil(setup.rows / setup.chunk) : dealt.chunks.rank.length,
  };
}

/** Return the rows of a query in their own order, grouped by the tile that each lies in. */
export function tilesOf(nRows: number, tileOf: (row: number) => number): Step {
  const step = new StepBuilder(nRows);
  step.band(NOBODY, EVERY);
  const rows = sequence(nRows);
  for (let start = 0, stop; start < nRows; start = stop) {
    const tile = tileOf(start);
    for (stop = start + 1; stop < nRows && tileOf(stop) === tile; ) stop++;
    step.group(rows.subarray(start, stop), NOBODY, EVERY);
  }
  return step.done();
}

/** Return mini-batches in the order in which a DataLoader yields them: one of each worker in turn. */
export function inTurn<T>(ofWorkers: readonly (readonly T[])[]): T[] {
  const most = Math.max(0, ...ofWorkers.map((items) => items.length));
  const found: T[] = [];
  for (let k = 0; k < most; k++) for (const items of ofWorkers) if (k < items.length) found.push(items[k]);
  return found;
}

/** Return [start, stop) of one of the parts that `np.array_split` makes. */
export function arraySplit(n: number, parts: number, part: number): [number, number] {
  const size = Math.floor(n / parts);
  const larger = n % parts;
  const start = part * size + Math.min(part, larger);
  return [start, start + size + (part < larger ? 1 : 0)];
}

/** Collects the groups of a step. */
export class StepBuilder {
  private readonly rows: Int32Array;
  private filled = 0;
  private readonly starts: number[] = [];
  private readonly rank: number[] = [];
  private readonly worker: number[] = [];
  private readonly bands: Band[] = [];

  constructor(nRows: number) {
    this.rows = new Int32Array(nRows);
  }

  band(rank: number, worker: number): void {
    this.bands.push({ firstGroup: this.starts.length, rank, worker });
  }

  group(rows: Int32Array, rank: number, worker: number): void {
    this.starts.push(this.filled);
    this.rank.push(rank);
    this.worker.push(worker);
    this.rows.set(rows, this.filled);
    this.filled += rows.length;
  }

  done(): Step {
    return {
      rows: this.rows.subarray(0, this.filled),
      starts: Int32Array.from([...this.starts, this.filled]),
      rank: Int32Array.from(this.rank),
      worker: Int32Array.from(this.worker),
      bands: this.bands.filter((band, i) => {
        const next = this.bands[i + 1]?.firstGroup ?? this.starts.length;
        return next > band.firstGroup;
      }),
    };
  }
}

type Dealt = Omit<Epoch["steps"], "query">;

/** Scope "partition": every worker of every rank has a part of its own, and shuffles that. */
function dealByPart(setup: Setup): Dealt {
  const { rows: n, ranks } = setup;
  const [chunks, ioBatches, miniBatches] = [new StepBuilder(n), new StepBuilder(n), new StepBuilder(n)];
  const nWorkers = Math.max(1, setup.workers);
  const query = sequence(n);
  const ends: number[] = [];
  for (let rank = 0; rank < ranks; rank++) {
    const [first] = arraySplit(n, ranks, rank);
    const ofWorkers: Yielded[][] = [];
    for (let worker = 0; worker < nWorkers; worker++) {
      const [start, stop] = arraySplit(Math.floor(n / ranks), nWorkers, worker);
      const part = query.subarray(first + start, first + stop);
      const shuffled = shuffledChunks(part, setup);
      chunks.band(rank, worker);
      for (const chunk of shuffled) chunks.group(chunk, rank, worker);
      ioBatches.band(rank, worker);
      const order = permutedBatches(concatenated(shuffled), setup.ioBatch, setup);
      for (const batch of order) ioBatches.group(batch, rank, worker);
      const yielded = cut(concatenated(order), setup.miniBatch);
      ofWorkers.push(yielded.map((rows) => ({ rows, worker })));
    }
    ends.push(first + Math.floor(n / ranks));
    addMiniBatches(miniBatches, ofWorkers, rank);
  }
  const left = ends.map((end, rank) => query.subarray(end, rank + 1 < ranks ? arraySplit(n, ranks, rank + 1)[0] : n));
  addLeftOut(left, chunks, ioBatches, miniBatches);
  return { chunks: chunks.done(), ioBatches: ioBatches.done(), miniBatches: miniBatches.done() };
}

/** Scope "global": chunks of the whole query are shuffled, and then dealt to ranks. */
function dealGlobally(setup: Setup): Dealt {
  const { rows: n, ranks, miniBatch } = setup;
  const [chunks, ioBatches, miniBatches] = [new StepBuilder(n), new StepBuilder(n), new StepBuilder(n)];
  const nWorkers = Math.max(1, setup.workers);
  const shuffled = shuffledChunks(sequence(n), setup);
  const order = concatenated(shuffled);
  const borders = new Int32Array(shuffled.length);
  for (let i = 0, end = 0; i < shuffled.length; i++) borders[i] = end += shuffled[i].length;
  const window = Math.max(miniBatch, Math.floor(setup.ioBatch / miniBatch) * miniBatch);
  const size = Math.floor(n / ranks);
  const left: Int32Array[] = [];
  for (let rank = 0; rank < ranks; rank++) {
    const [start, end] = arraySplit(n, ranks, rank);
    chunks.band(rank, EVERY);
    for (const piece of cutAt(order, borders, start, start + size)) chunks.group(piece, rank, EVERY);
    ioBatches.band(rank, EVERY);
    const batches = permutedBatches(order.subarray(start, start + size), window, setup);
    for (const batch of batches) ioBatches.group(batch, rank, EVERY);
    const yielded = cut(concatenated(batches), miniBatch);
    const ofWorkers = Array.from({ length: nWorkers }, (_, worker) => {
      const [from, to] = arraySplit(yielded.length, nWorkers, worker);
      return yielded.slice(from, to).map((rows) => ({ rows, worker }));
    });
    addMiniBatches(miniBatches, ofWorkers, rank);
    left.push(order.subarray(start + size, end));
  }
  addLeftOut(left, chunks, ioBatches, miniBatches);
  return { chunks: chunks.done(), ioBatches: ioBatches.done(), miniBatches: miniBatches.done() };
}

interface Yielded {
  rows: Int32Array;
  worker: number;
}

function addMiniBatches(step: StepBuilder, ofWorkers: readonly (readonly Yielded[])[], rank: number): void {
  step.band(rank, EVERY);
  for (const { rows, worker } of inTurn(ofWorkers)) step.group(rows, rank, worker);
}

/** Rows that nobody gets, so that every rank has the same number. */
function addLeftOut(left: readonly Int32Array[], ...steps: readonly StepBuilder[]): void {
  const rows = concatenated(left);
  for (const step of steps) {
    step.band(NOBODY, EVERY);
    if (rows.length > 0) step.group(rows, NOBODY, EVERY);
  }
}

/** `QueryIDs.shuffle_chunks` */
function shuffledChunks(rows: Int32Array, { chunk, seed, epoch }: Setup): Int32Array[] {
  const order = new Generator([seed, BigInt(epoch)]).permutation(Math.ceil(rows.length / chunk));
  return Array.from(order, (k) => rows.subarray(k * chunk, (k + 1) * chunk));
}

/** `id_batches`: one draw for each batch, in sequence. */
function permutedBatches(rows: Int32Array, size: number, { seed, epoch }: Setup): Int32Array[] {
  const generator = new Generator([seed, BigInt(epoch)]);
  return cut(rows, size).map((batch) => generator.permutation(batch.length).map((place) => batch[place]));
}

function cut(rows: Int32Array, size: number): Int32Array[] {
  return Array.from({ length: Math.ceil(rows.length / size) }, (_, k) => rows.subarray(k * size, (k + 1) * size));
}

/** Return the rows from `start` to `stop`, cut where one of `borders` lies between. */
function cutAt(rows: Int32Array, borders: Int32Array, start: number, stop: number): Int32Array[] {
  const pieces: Int32Array[] = [];
  for (const border of borders) {
    const end = Math.min(border, stop);
    if (end <= start) continue;
    pieces.push(rows.subarray(start, end));
    start = end;
  }
  return pieces;
}

function concatenated(parts: readonly Int32Array[]): Int32Array {
  const whole = new Int32Array(parts.reduce((n, part) => n + part.length, 0));
  let filled = 0;
  for (const part of parts) {
    whole.set(part, filled);
    filled += part.length;
  }
  return whole;
}

function sequence(n: number): Int32Array {
  const rows = new Int32Array(n);
  for (let row = 0; row < n; row++) rows[row] = row;
  return rows;
}
