/** How fast a query is read: predictions from read amplification and from speeds that were measured. */

import type { Scope } from "./order/epoch";
import { partsOf, predictedMixing, rowsPerShare, type Sharing } from "./order/mixing";
import { chooseSizes, readSize } from "./order/tradeoff";

/** Reading a row of a snapshot from the page cache; measured, for a non-zero. */
export const SNAPSHOT_NS = 1.3;

/** Bytes of a row that waits in a window: columns below 65,536 and counts below 256 take 3, and the row itself 48. */
const BYTES_PER_NON_ZERO = 3;
const BYTES_PER_ROW = 48;

export interface Way {
  chunk: number;
  window: number;
  /** Rows that are read at once. */
  readRows: number;
  amplification: number;
  rowsPerS: number;
  mixing: number;
}

/** What is read, by how many, and how fast a scan of whole tiles is. */
export interface Query {
  rows: number;
  tile: number;
  miniBatch: number;
  nonZeros: number;
  scanNs: number;
  /** Memory, in GiB. */
  budget: number;
  scope: Scope;
  ranks: number;
  workers: number;
}

/** Return what chunks of a size cost in windows of a size, and how well they mix. */
export function predict(query: Query, chunk: number, window: number): Way {
  const sharing = sharingOf(query);
  const rows = Math.min(window, Math.ceil(rowsPerShare(sharing)));
  const ofReader = Math.max(1, Math.floor(query.rows / (sharing.ranks * sharing.readers)));
  // In the scope "global", readers need rows of tiles that others read too.
  const shuffled = query.scope === "global" ? query.rows : ofReader;
  const { readRows, amplification } = readSize({ chunk, window: rows, tile: query.tile, rows: shuffled, ofReader, held: heldRows(query) });
  return {
    chunk,
    window: rows,
    readRows,
    amplification,
    rowsPerS: 1e9 / (query.nonZeros * query.scanNs * amplification),
    mixing: predictedMixing(sharing, chunk, rows),
  };
}

/** Return what "auto" takes within the budget of memory. */
export function predictAuto(query: Query): Way {
  const { chunk, window } = chooseSizes(sharingOf(query), query.tile, Math.max(query.tile, heldRows(query)));
  return predict(query, chunk, window);
}

/** Return how many rows memory holds. */
function heldRows({ budget, nonZeros }: Query): number {
  return Math.floor(windowBytes(budget * 2 ** 30) / bytesPerRow(nonZeros));
}

/** Return how well single rows are mixed, as a snapshot reads them: as well as the scope allows. */
export function bestMixing(query: Query): number {
  return predictedMixing(sharingOf(query), 1, query.rows);
}

/** Return how many parts are shuffled by themselves. */
export function nParts(query: Query): number {
  return partsOf(sharingOf(query));
}

function sharingOf({ rows, miniBatch, scope, ranks, workers }: Query): Sharing {
  return { rows, miniBatch, scope, ranks, readers: Math.max(1, workers) };
}

export function bytesPerRow(nonZeros: number): number {
  return nonZeros * BYTES_PER_NON_ZERO + BYTES_PER_ROW;
}

/** Return the chunk sizes of a curve: powers of two, to the window, or to four tiles where that is less. */
export function chunkSizes(query: Query, window: number): number[] {
  const sizes: number[] = [];
  for (let chunk = 1; chunk <= Math.min(window, query.rows, query.tile * 4); chunk *= 2) sizes.push(chunk);
  return sizes;
}

/** Return what a budget of memory leaves for a window, as `_budget.py` divides it for an experiment on a local disk. */
export function windowBytes(total: number): number {
  const MiB = 2 ** 20;
  const within = (size: number, least: number, most: number) => Math.min(Math.max(Math.floor(size), least * MiB), most * MiB);
  const tiledb = within(total / 16, 16, 128);
  const buffers = 9 * within(total / 128, 1, 8);
  const fixed = Math.min(128 * MiB, Math.floor(total / 2));
  const malloc = within((total - 256 * MiB) / 4, 0, 128);
  return Math.max(0, Math.floor((Math.floor(total * 0.95) - tiledb - buffers - fixed - malloc) / (1 + 5 / 32)));
}
