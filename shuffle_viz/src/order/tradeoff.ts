/**
 * What a chunk size costs and how well it mixes: the predictions that `tiledbsoma_ml` chooses "auto" by.
 *
 * The same formulas as in `_order/sizes.py`, for a query of neighbouring rows; `tests/golden.test.ts` compares them.
 */

import { inverseNormal } from "./normal";

/** Chunks in a window of the documented defaults: "auto" mixes no worse. */
const REFERENCE_CHUNKS = 1024;
/** Rows read together at most where chunks are single rows: more would only keep the first ones waiting. */
const ENOUGH_ROWS = 65_536;
const TOLERANCE = 0.005;

export interface Sizes {
  /** Rows of a chunk. */
  chunk: number;
  /** Rows read together. */
  window: number;
  /** Predicted. */
  mixing: number;
}

/** Return how many times a tile is decoded in an epoch of shuffled chunks of neighbouring rows. */
export function readAmplification(chunk: number, ioBatch: number, tile: number, rows: number): number {
  const nTiles = Math.max(1, rows / tile);
  const nBatches = Math.max(1, rows / ioBatch);
  const chunksPerBatch = Math.min(rows, ioBatch) / chunk;
  const tilesPerChunk = Math.max(1, chunk / tile);
  const touched = nTiles * -Math.expm1((-chunksPerBatch * tilesPerChunk) / nTiles);
  return Math.max(1, (nBatches * touched) / nTiles);
}

/**
 * Return the mean entropy of labels in a mini-batch as a share of that in a truly random one.
 *
 * The labels are those of a model of the CELLxGENE Census: 900 datasets of log-normal size, stored one after
 * the other. Mini-batches of fewer than 16 rows are judged by 16 that follow each other.
 */
export function predictedMixing(nChunks: number, miniBatch: number): number {
  const size = Math.min(Math.max(miniBatch, 16), 4096);
  return Math.max(0, entropy(1 / (1 / nChunks + 1 / size)) / entropy(size));
}

/** Return what "auto" stands for where rows of the query are neighbours: the longest runs that mix well. */
export function chooseSizes(rows: number, tile: number, windowRows: number, miniBatch: number): Sizes {
  const held = Math.max(1, tile > 1 ? windowRows : Math.min(windowRows, ENOUGH_ROWS));
  const nWindows = Math.max(1, Math.ceil(rows / held));
  const window = Math.ceil(rows / nWindows);
  if (nWindows === 1 || tile === 1) return { chunk: tile, window, mixing: 1 };
  const target = predictedMixing(REFERENCE_CHUNKS, miniBatch) - TOLERANCE;
  for (let chunk = tile; ; chunk /= 2) {
    const mixing = predictedMixing(window / (rows / Math.ceil(rows / chunk)), miniBatch);
    if (mixing >= target || chunk % 2 === 1) return { chunk, window, mixing };
  }
}

/** Shares of the query that each of `n` labels has: log-normal, as the datasets of the Census are. */
export function labelShares(n: number): Float64Array {
  const weights = Float64Array.from({ length: n }, (_, k) => Math.exp(1.5 * inverseNormal((k + 0.5) / n)));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

const MODEL = labelShares(900);
const known = new Map<number, number>();

/** Return the expected entropy, in nats, of the labels of rows drawn at random from the model. */
function entropy(nDraws: number): number {
  let found = known.get(nDraws);
  if (found === undefined) {
    let sum = 0;
    for (const share of MODEL) {
      const expected = nDraws * share;
      let poisson = Math.exp(-expected);
      for (let k = 1; k < 600 && (k < expected || poisson > 1e-20); k++) {
        poisson *= expected / k;
        sum += poisson * k * Math.log(k);
      }
    }
    found = Math.log(nDraws) - sum / nDraws;
    known.set(nDraws, found);
  }
  return found;
}
