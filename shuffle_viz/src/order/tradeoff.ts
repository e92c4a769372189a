/**
 * What a chunk size costs and how well it mixes: the predictions that `tiledbsoma_ml` chooses "auto" by.
 *
 * The same formulas as in `_order/sizes.py` and `_order/reads.py`, for a query of neighbouring rows; `tests/golden.test.ts` compares them.
 */

import { predictedMixing, type Sharing } from "./mixing";

/** The documented defaults: "auto" mixes as well as they do. */
const DEFAULT_CHUNK = 64;
const DEFAULT_WINDOW = 65_536;
/** Rows of a query that is far larger than a window: "auto" mixes as well as the defaults mix it. */
const CENSUS_ROWS = 20_000_000;
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
  /** Rows that are shuffled together. */
  rows: number;
  /** Rows of them that one process reads. */
  ofReader: number;
  /** Rows that memory holds. */
  held: number;
}

/** Return how many rows are read at once, and how many times a tile is decoded in an epoch then. */
export function readSize(reading: Reading): { readRows: number; amplification: number } {
  const { window, ofReader } = reading;
  const held = Math.max(1, Math.min(reading.held, ofReader));
  const small = Math.min(window, held);
  const [ofHeld, ofSmall] = [timesDecoded(reading, held), timesDecoded(reading, small)];
  return { readRows: ofHeld > WORTHWHILE * ofSmall ? small : held, amplification: Math.min(ofHeld, ofSmall) };
}

function timesDecoded(reading: Reading, readRows: number): number {
  const { ofReader } = reading;
  const nReads = Math.max(1, Math.ceil(ofReader / readRows));
  return Math.max(1, (nReads * touched(reading, ofReader / nReads)) / Math.max(1, ofReader / tileRows(reading)));
}

/** Return how many tiles a read of so many rows decodes; see `ReadSizes` in `_order/reads.py`. */
function touched(reading: Reading, readRows: number): number {
  const { chunk, window, rows, ofReader } = reading;
  if (readRows < window && window < ofReader) {
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
 * Return what "auto" stands for where rows of the query are neighbours: the longest runs that mix well.
 *
 * In the scope "partition", the sizes of a part are those of a query that has its rows only.
 */
export function chooseSizes(sharing: Sharing, tile: number, windowRows: number): Sizes {
  const isGlobal = sharing.scope === "global";
  const own: Sharing = isGlobal ? sharing : { ...sharing, rows: rowsOfFirstPart(sharing), ranks: 1, readers: 1 };
  const held = Math.max(1, tile > 1 ? windowRows : Math.min(windowRows, ENOUGH_ROWS));
  const ofShare = Math.ceil(own.rows / own.ranks);
  const nWindows = Math.max(1, Math.ceil(ofShare / held));
  const window = Math.ceil(ofShare / nWindows);
  const sizes = (chunk: number, rows: number) => ({ chunk, window, mixing: predictedMixing(sharing, rows, window, !isGlobal) });
  if ((nWindows === 1 && own.ranks === 1) || tile === 1) return sizes(tile, 1);
  const target = mixingOfDefaults(own) - TOLERANCE;
  for (let chunk = tile; ; chunk /= 2) {
    const rows = own.rows / Math.ceil(own.rows / chunk);
    if (predictedMixing(own, rows, window, !isGlobal) >= target || chunk % 2 === 1) return sizes(chunk, rows);
  }
}

/** Return the predicted mixing of the defaults, but no more than they reach in large queries. */
function mixingOfDefaults(sharing: Sharing): number {
  const large: Sharing = { rows: CENSUS_ROWS, miniBatch: sharing.miniBatch, scope: "partition", ranks: 1, readers: 1 };
  return Math.min(...[sharing, large].map((query) => predictedMixing(query, DEFAULT_CHUNK, DEFAULT_WINDOW)));
}

/** Return the number of rows of the first worker of a rank: it has one more where they do not divide. */
function rowsOfFirstPart({ rows, ranks, readers }: Sharing): number {
  return Math.ceil(Math.floor(rows / ranks) / readers);
}
