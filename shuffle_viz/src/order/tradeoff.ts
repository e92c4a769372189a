/**
 * What a chunk size costs and how well it mixes: the predictions that `tiledbsoma_ml` chooses "auto" by.
 *
 * The same formulas as in `_order/sizes.py` and `_order/reads.py`, for a query of neighbouring rows; `tests/golden.test.ts` compares them.
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

/** Large reads are taken if they decode less than this share of what small reads decode. */
const WORTHWHILE = 0.9;

/** How a query of neighbouring rows is read. */
export interface Reading {
  chunk: number;
  /** Rows of a window, the smallest read that memory holds. */
  window: number;
  tile: number;
  rows: number;
  /** Rows that memory holds. */
  held: number;
}

/** Return how many rows are read at once, and how many times a tile is decoded in an epoch then. */
export function readSize(reading: Reading): { readRows: number; amplification: number } {
  const { window, rows } = reading;
  const held = Math.max(1, Math.min(reading.held, rows));
  const small = Math.min(window, held);
  const [ofHeld, ofSmall] = [timesDecoded(reading, held), timesDecoded(reading, small)];
  return { readRows: ofHeld > WORTHWHILE * ofSmall ? small : held, amplification: Math.min(ofHeld, ofSmall) };
}

function timesDecoded(reading: Reading, readRows: number): number {
  const nReads = Math.max(1, Math.ceil(reading.rows / readRows));
  return Math.max(1, (nReads * touched(reading, reading.rows / nReads)) / Math.max(1, reading.rows / tileRows(reading)));
}

/** Return how many tiles a read of so many rows decodes; see `ReadSizes` in `_order/reads.py`. */
function touched(reading: Reading, readRows: number): number {
  const { chunk, window, rows } = reading;
  if (readRows < window && window < rows) {
    const ofWindow = touched(reading, window);
    return ofWindow * (1 - (1 - readRows / window) ** (window / ofWindow));
  }
  const nTiles = Math.ceil(rows / reading.tile);
  const nShared = Math.ceil(rows / ((reading.tile / gcd(reading.tile, chunk)) * chunk));
  const chunksPerTile = 1 + Math.max(0, rows / chunk - nShared) / nTiles;
  const morePieces = Math.max(0, 1 / Math.max(1, readRows) - 1 / chunk);
  const piecesPerTile = chunksPerTile + tileRows(reading) * morePieces;
  return Math.max(1, rows / tileRows(reading)) * (1 - (1 - Math.min(1, readRows / rows)) ** piecesPerTile);
}

function tileRows({ rows, tile }: Reading): number {
  return rows / Math.ceil(rows / tile);
}

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
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
