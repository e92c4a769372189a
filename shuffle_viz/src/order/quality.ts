/** What an order is worth, in numbers. */

import { NOBODY, type Epoch, type Step } from "./epoch";
import { Generator } from "./random";
import { labelShares } from "./mixing";

export type LabelOrder = "sorted" | "random";

/** What a mini-batch mixes. */
export interface Mix {
  tiles: number;
  labels: number;
  entropyBits: number;
}

export interface Quality {
  /** Of each group of the last step, NOBODY's included. */
  mixes: Mix[];
  mean: Mix;
  /** The same for mini-batches of a full shuffle. */
  random: Mix;
  /** log2 of the number of orders that the rules can give, and of all orders of as many rows. */
  orderBits: number;
  fullOrderBits: number;
  /** How many tiles there are, and how many are decoded in an epoch. */
  nTiles: number;
  tilesDecoded: number;
  nLeftOut: number;
}

/** Rows of full shuffles that are looked at, so that few rows are shuffled many times. */
const ROWS_TO_SHUFFLE = 50_000;

/** Return what an epoch is worth, given the label of each row. */
export function qualityOf(epoch: Epoch, labels: Int32Array): Quality {
  const tiles = tileOfRows(epoch.steps.query);
  const nTiles = epoch.steps.query.rank.length;
  const { miniBatches, ioBatches } = epoch.steps;
  const mixes = mixOf(miniBatches, tiles, labels);
  const isRead = (_: Mix, group: number) => miniBatches.rank[group] !== NOBODY;
  const generator = new Generator([0n]);
  const shuffles = Array.from({ length: Math.ceil(ROWS_TO_SHUFFLE / Math.max(1, miniBatches.rows.length)) }, () => {
    const rows = generator.permutation(miniBatches.rows.length).map((place) => miniBatches.rows[place]);
    return meanOf(mixOf({ ...miniBatches, rows }, tiles, labels).filter(isRead));
  });
  const nRead = miniBatches.rows.length - countLeftOut(miniBatches);
  return {
    mixes,
    mean: meanOf(mixes.filter(isRead)),
    random: meanOf(shuffles),
    orderBits: orderBitsOf(epoch),
    fullOrderBits: logFactorial(nRead) / Math.LN2,
    nTiles,
    tilesDecoded: mixOf(ioBatches, tiles, labels).reduce(
      (sum, mix, group) => sum + (ioBatches.rank[group] === NOBODY ? 0 : mix.tiles),
      0,
    ),
    nLeftOut: countLeftOut(miniBatches),
  };
}

/** Return a label for each row: as many as asked for, of log-normal size, one after the other or at random. */
export function labelsOf(nRows: number, nLabels: number, order: LabelOrder): Int32Array {
  const n = Math.min(nLabels, nRows);
  const shares = labelShares(n);
  const sizes = new Generator([1n]).permutation(n); // sizes as they come, not the smallest first
  const labels = new Int32Array(nRows);
  let end = 0;
  for (let label = 0, start = 0; label < n; label++, start = Math.round(end * nRows)) {
    end += shares[sizes[label]];
    labels.fill(label, start, label === n - 1 ? nRows : Math.round(end * nRows));
  }
  if (order === "random") new Generator([2n]).shuffle(labels);
  return labels;
}

/** Return the number of the tile that each row lies in. */
export function tileOfRows(query: Step): Int32Array {
  const tiles = new Int32Array(query.rows.length);
  for (let tile = 0; tile < query.rank.length; tile++) {
    for (let place = query.starts[tile]; place < query.starts[tile + 1]; place++) tiles[query.rows[place]] = tile;
  }
  return tiles;
}

function mixOf(step: Step, tiles: Int32Array, labels: Int32Array): Mix[] {
  const countTiles = counter(tiles);
  const countLabels = counter(labels);
  return Array.from(step.rank, (_, group) => {
    const rows = step.rows.subarray(step.starts[group], step.starts[group + 1]);
    const counts = countLabels(rows);
    let bits = 0;
    for (const count of counts) bits -= (count / rows.length) * Math.log2(count / rows.length);
    return { tiles: countTiles(rows).length, labels: counts.length, entropyBits: Math.max(0, bits) };
  });
}

/** Return a function that counts how often each value occurs among some rows; it takes no longer than these. */
function counter(values: Int32Array): (rows: Int32Array) => number[] {
  const counts = new Int32Array(values.reduce((most, value) => Math.max(most, value), -1) + 1);
  return (rows) => {
    const seen: number[] = [];
    for (const row of rows) if (counts[values[row]]++ === 0) seen.push(values[row]);
    return seen.map((value) => {
      const count = counts[value];
      counts[value] = 0;
      return count;
    });
  };
}

function meanOf(mixes: readonly Mix[]): Mix {
  const n = Math.max(1, mixes.length);
  const sum = { tiles: 0, labels: 0, entropyBits: 0 };
  for (const mix of mixes) {
    sum.tiles += mix.tiles;
    sum.labels += mix.labels;
    sum.entropyBits += mix.entropyBits;
  }
  return { tiles: sum.tiles / n, labels: sum.labels / n, entropyBits: sum.entropyBits / n };
}

function countLeftOut(step: Step): number {
  let n = 0;
  step.rank.forEach((rank, group) => {
    if (rank === NOBODY) n += step.starts[group + 1] - step.starts[group];
  });
  return n;
}

/**
 * Return log2 of the number of orders that chunk shuffle and permuted IO batches can give.
 *
 * The M chunks that are shuffled together can be dealt to IO batches of k chunks in M! / (k1! k2! …) ways, and
 * the rows of each IO batch can come in any order. Exact where chunks are of equal size.
 */
function orderBitsOf({ steps: { chunks, ioBatches }, scope, nChunks }: Epoch): number {
  const isGlobal = scope === "global";
  const key = (step: Step, group: number) => (isGlobal ? "all" : `${step.rank[group]} ${step.worker[group]}`);
  const size = (step: Step, group: number) => step.starts[group + 1] - step.starts[group];
  const parts = new Map<string, { chunks: number; rows: number }>();
  chunks.rank.forEach((rank, group) => {
    if (rank === NOBODY && !isGlobal) return;
    const part = parts.get(key(chunks, group)) ?? { chunks: 0, rows: 0 };
    parts.set(key(chunks, group), { chunks: part.chunks + 1, rows: part.rows + size(chunks, group) });
  });
  if (isGlobal) parts.forEach((part) => (part.chunks = nChunks)); // some are cut between two ranks
  let nats = 0;
  for (const part of parts.values()) nats += logFactorial(part.chunks);
  ioBatches.rank.forEach((rank, group) => {
    const part = parts.get(key(ioBatches, group));
    if (!part) return;
    const nRows = size(ioBatches, group);
    if (rank !== NOBODY) nats += logFactorial(nRows);
    nats -= logFactorial((nRows * part.chunks) / part.rows);
  });
  return Math.max(0, nats / Math.LN2);
}

/** Return ln x!, also between whole numbers (Stirling's series). */
export function logFactorial(x: number): number {
  let shift = 0;
  for (; x < 10; x++) shift += Math.log(x + 1);
  const series = 1 / (12 * x) - 1 / (360 * x ** 3) + 1 / (1260 * x ** 5);
  return x * Math.log(x) - x + 0.5 * Math.log(2 * Math.PI * x) + series - shift;
}
