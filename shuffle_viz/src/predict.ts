/** How fast a query is read: predictions from read amplification and from speeds that were measured. */

import { chooseSizes, predictedMixing, readAmplification } from "./order/tradeoff";

/** Reading a row of a snapshot from the page cache; measured, for a non-zero. */
export const SNAPSHOT_NS = 1.3;

/** Bytes of a row that waits in a window: columns below 65,536 and counts below 256 take 3, and the row itself 48. */
const BYTES_PER_NON_ZERO = 3;
const BYTES_PER_ROW = 48;

export interface Way {
  chunk: number;
  window: number;
  amplification: number;
  rowsPerS: number;
  mixing: number;
}

/** What is read, and how fast a scan of whole tiles is. */
export interface Query {
  rows: number;
  tile: number;
  miniBatch: number;
  nonZeros: number;
  scanNs: number;
}

/** Return what chunks of a size cost in windows of a size, and how well they mix. */
export function predict(query: Query, chunk: number, window: number): Way {
  const rows = Math.min(window, query.rows);
  const amplification = readAmplification(chunk, rows, query.tile, query.rows);
  return {
    chunk,
    window: rows,
    amplification,
    rowsPerS: 1e9 / (query.nonZeros * query.scanNs * amplification),
    mixing: rows >= query.rows ? 1 : predictedMixing(rows / Math.min(chunk, rows), query.miniBatch),
  };
}

/** Return what "auto" takes within a budget of memory, in GiB. */
export function predictAuto(query: Query, budgetGiB: number): Way {
  const bytes = windowBytes(budgetGiB * 2 ** 30);
  const most = Math.max(query.tile, Math.floor(bytes / bytesPerRow(query.nonZeros)));
  const { chunk, window } = chooseSizes(query.rows, query.tile, most, query.miniBatch);
  return predict(query, chunk, window);
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

/** What a budget of memory leaves for a window, roughly as `_budget.py` divides it. */
function windowBytes(total: number): number {
  const MiB = 2 ** 20;
  const tiledb = Math.min(Math.max(total / 16, 16 * MiB), 64 * MiB);
  const buffers = 9 * Math.min(Math.max(total / 128, MiB), 8 * MiB);
  const windows = total * 0.95 - tiledb - buffers - Math.min(128 * MiB, total / 2);
  return Math.max(0, windows) / (1 + 5 / 32);
}
