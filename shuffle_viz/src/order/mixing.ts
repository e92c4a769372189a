/**
 * How well mini-batches are mixed, predicted for each number of ranks and workers.
 *
 * The same formulas as in `_order/mixing.py`, which explains them; `tests/golden.test.ts` compares them.
 */

import type { Scope } from "./epoch";
import { inverseNormal } from "./normal";

/** Numbers of labels of the model, and the mean number of rows of a label between these numbers. */
const FEWEST_LABELS = 10;
const MOST_LABELS = 900;
const ROWS_PER_LABEL = 600;
/** Smallest number of rows by which a mini-batch is judged. */
const FEWEST_ROWS = 16;
/** Expected number of chunks up to which the chances of 0, 1, 2, … chunks are listed one by one. */
const MOST_LISTED = 6;

/** The rows of a query, and the ranks and workers that share them. */
export interface Sharing {
  rows: number;
  miniBatch: number;
  scope: Scope;
  ranks: number;
  /** Reading processes of a rank: at least one. */
  readers: number;
}

/** The runs of labels: run `k` has the rows from `starts[k]` to `stops[k]`. */
interface Runs {
  starts: Float64Array;
  stops: Float64Array;
}

/** The way in which the rows of a mini-batch are drawn. */
interface Drawn {
  /** Rows that may be in one mini-batch. */
  rows: number;
  chunk: number;
  window: number;
  batch: number;
  /** Share of the ends of windows that cut a chunk. */
  cuts: number;
}

/** Return the number of parts that are shuffled by themselves. */
export function partsOf({ scope, ranks, readers }: Sharing): number {
  return scope === "global" ? 1 : ranks * readers;
}

/** Return the number of rows that are divided into windows: those of a rank, or those of a part. */
export function rowsPerShare(sharing: Sharing): number {
  return Math.max(1, sharing.rows / (sharing.scope === "global" ? sharing.ranks : partsOf(sharing)));
}

/**
 * Return the mean entropy of labels in a mini-batch as a share of that in a random one of the whole query.
 *
 * The labels are those of a model of the CELLxGENE Census: data sets of log-normal size, stored one after the
 * other. Mini-batches of fewer than 16 rows are judged by 16 that follow each other.
 */
export function predictedMixing(sharing: Sharing, chunk: number, windowRows: number, endsWithChunk = false): number {
  const share = rowsPerShare(sharing);
  const batch = Math.min(Math.max(sharing.miniBatch, FEWEST_ROWS), share);
  const window = Math.min(Math.max(windowRows, batch), share);
  const nParts = partsOf(sharing);
  if (nParts === 1 && (chunk <= 1 || window >= sharing.rows)) return 1;
  const labels = model(sharing.rows);
  const most = entropyAtRandom(sharing.rows, batch);
  if (most <= 1e-9) return 1;
  const cuts = endsWithChunk ? 0 : sharing.scope === "global" ? 1 : 0.5;
  const drawn = { rows: sharing.rows / nParts, chunk, window, batch, cuts };
  return Math.min(1, Math.max(0, entropy(nParts === 1 ? labels : cut(labels, nParts), drawn) / most));
}

/** Shares of the query that each of `n` labels has: log-normal, as the data sets of the Census are. */
export function labelShares(n: number): Float64Array {
  const weights = Float64Array.from({ length: n }, (_, k) => Math.exp(1.5 * inverseNormal((k + 0.5) / n)));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

const models = new Map<number, Runs>();

/** Return the model's labels, a run each. */
function model(rows: number): Runs {
  let found = models.get(rows);
  if (found === undefined) {
    const n = Math.min(rows, Math.max(FEWEST_LABELS, Math.min(MOST_LABELS, Math.ceil(rows / ROWS_PER_LABEL))));
    const golden = (Math.sqrt(5) - 1) / 2;
    const order = Array.from({ length: n }, (_, k) => k).sort((a, b) => ((a * golden) % 1) - ((b * golden) % 1));
    const shares = labelShares(n);
    const stops = new Float64Array(n);
    let sum = 0;
    order.forEach((label, k) => (stops[k] = rows * (sum += shares[label])));
    stops[n - 1] = rows;
    found = { starts: Float64Array.from([0, ...stops.subarray(0, n - 1)]), stops };
    models.clear(); // one query is looked at
    models.set(rows, found);
  }
  return found;
}

/** Return the same runs, cut where one of `n` parts begins: parts never share a mini-batch. */
function cut({ starts, stops }: Runs, n: number): Runs {
  const last = stops[stops.length - 1];
  const begins = Array.from({ length: n }, (_, k) => (k * last) / n);
  const all = Float64Array.from(new Set([...starts, ...begins])).sort();
  return { starts: all, stops: Float64Array.from([...all.subarray(1), last]) };
}

const atRandom = new Map<string, number>();

/** Return the expected entropy of a mini-batch that is drawn from the whole query. */
function entropyAtRandom(rows: number, batch: number): number {
  const key = `${rows} ${batch}`;
  let found = atRandom.get(key);
  if (found === undefined) {
    found = entropy(model(rows), { rows, chunk: 1, window: rows, batch, cuts: 0 });
    atRandom.set(key, found);
  }
  return found;
}

/** Return the expected entropy of the labels in a mini-batch, in nats. */
function entropy({ starts, stops }: Runs, { rows, chunk, window, batch, cuts }: Drawn): number {
  const least = Math.min(chunk, rows);
  const lost = (cuts * (1 - window / rows) * Math.min(least, window)) / (3 * Math.max(least, window));
  const shareOfOwn = (Math.min(least, window) / least) * (1 - lost);
  const nOthers = rows - chunk;
  const shareOfOthers = nOthers <= 0 ? 1 : Math.min(1, Math.max(0, (window - shareOfOwn * chunk) / nOthers));
  const total = rows / chunk;
  const rate = window > 1 ? (batch - 1) / (window - 1) : 1;
  let sum = 0;
  let nRows = 0;
  for (let k = 0; k < starts.length; k++) {
    const [ofLabel, inChunk, spread] = rowsInChunks(starts[k], stops[k], chunk);
    const others = Math.max(ofLabel - inChunk, 0);
    const nChunks = ratio(others, inChunk);
    const nInWindow = nChunks * shareOfOthers;
    let variance = nInWindow * (1 - shareOfOthers);
    if (total > 2) variance *= Math.min(1, Math.max(0, 1 - (nChunks - 1) / (total - 2)));
    const own = rate * Math.max(inChunk * shareOfOwn - 1, 0);
    const each = rate * inChunk;
    const mean = own + each * nInWindow;
    const ofWindow = Math.min(1, mean / Math.max(batch - 1, 1e-9));
    const excess = mean * (1 - (1 - ofWindow) * (1 - rate)) - (rate * (shareOfOwn - shareOfOthers)) ** 2 * spread;
    sum += ofLabel * (meanLog(own, each, nInWindow, variance) + excess / (2 * (1 + mean) ** 2));
    nRows += ofLabel;
  }
  return Math.log(batch) - sum / nRows;
}

/** Return the rows of a run, and the mean and variance of the rows in the chunk of a row of it. */
function rowsInChunks(start: number, stop: number, chunk: number): [number, number, number] {
  const first = Math.floor(start / chunk);
  const last = Math.floor(stop / chunk);
  const begin = first === last ? stop - start : (first + 1) * chunk - start;
  const end = first === last ? 0 : stop - last * chunk;
  const nWhole = Math.max(last - first - 1, 0);
  const moment = (power: number) => begin ** power + end ** power + nWhole * chunk ** power;
  const rows = moment(1);
  const mean = moment(2) / rows;
  return [rows, mean, Math.max(moment(3) / rows - mean ** 2, 0)];
}

/** Return E log(1 + Y): Y is a Poisson number, whose mean depends on a binomial number of chunks. */
function meanLog(own: number, each: number, nChunks: number, variance: number): number {
  const chance = 1 - ratio(variance, nChunks);
  const nTries = ratio(nChunks, chance);
  const nMisses = nTries - nChunks;
  const countsHits = nChunks <= nMisses;
  if (Math.min(nChunks, nMisses) < MOST_LISTED && variance > 1e-9) {
    return listed(own, each, nTries, countsHits ? chance : 1 - chance, countsHits);
  }
  const mean = own + each * nChunks;
  return poissonMeanLog(mean) - (each ** 2 * variance) / (2 * (1 + mean) ** 2);
}

function listed(own: number, each: number, nTries: number, chance: number, countsHits: boolean): number {
  const below = Math.floor(nTries);
  let result = 0;
  for (const [tries, weight] of [
    [below, 1 - (nTries - below)],
    [below + 1, nTries - below],
  ]) {
    let likely = weight * (1 - chance) ** tries;
    for (let n = 0; n < 64 && !(n > MOST_LISTED + 1 && likely < 1e-11); n++) {
      result += likely * poissonMeanLog(own + each * (countsHits ? n : Math.max(tries - n, 0)));
      likely *= ((Math.max(tries - n, 0) / (n + 1)) * chance) / (1 - chance);
    }
  }
  return result;
}

const STEPS = 4096;
const MOST_LOG = Math.log(100_001);
const TABLE = table();

/** Return E log(1 + Y) of a Poisson number Y. */
function poissonMeanLog(mean: number): number {
  const log = Math.log1p(mean);
  const at = (Math.min(log, MOST_LOG) / MOST_LOG) * STEPS;
  const step = Math.min(Math.floor(at), STEPS - 1);
  return log - (TABLE[step] + (at - step) * (TABLE[step + 1] - TABLE[step]));
}

/** Return log(1 + mean) - E log(1 + Y) for means from 0 to 100,000. */
function table(): Float64Array {
  return Float64Array.from({ length: STEPS + 1 }, (_, step) => {
    const log = (step / STEPS) * MOST_LOG;
    const mean = Math.expm1(log);
    if (mean >= 60) {
      const a = 1 + mean;
      return mean / (2 * a ** 2) - mean / (3 * a ** 3) + (mean * (1 + 3 * mean)) / (4 * a ** 4);
    }
    let likely = Math.exp(-mean);
    let sum = 0;
    for (let n = 1; n < 180; n++) {
      likely *= mean / n;
      sum += likely * Math.log1p(n);
    }
    return log - sum;
  });
}

/** Return `a / b`, and 0 where `b` is 0 or nearly so. */
function ratio(a: number, b: number): number {
  return b > 1e-9 ? a / b : 0;
}
