/** Follows rows through the steps of an epoch, in places and in words. */

import { EVERY, NOBODY, STEP_NAMES, type Epoch, type Step, type StepName } from "../order/epoch";

/** The place of each row in each step; -1 where it has none. */
export type Places = Record<StepName, Int32Array>;

export function placesOf(epoch: Epoch): Places {
  const places = {} as Places;
  for (const name of STEP_NAMES) {
    const { rows } = epoch.steps[name];
    const found = new Int32Array(epoch.nRows).fill(-1);
    for (let place = rows.length - 1; place >= 0; place--) found[rows[place]] = place;
    places[name] = found;
  }
  return places;
}

/** Return the group that a place lies in. */
export function groupAt(step: Step, place: number): number {
  let found = 0;
  for (let low = 0, high = step.rank.length; low < high; ) {
    const middle = (low + high) >> 1;
    if (step.starts[middle] <= place) [found, low] = [middle, middle + 1];
    else high = middle;
  }
  return found;
}

/** The name of a band, in full or as short as fits beside it. */
export function bandName(step: Step, band: number, isShort: boolean): string {
  const { rank, worker } = step.bands[band];
  if (rank === NOBODY) return step.bands.length < 2 ? "" : isShort ? "left out" : "left out of this epoch";
  if (isShort && !step.bands.some((band) => band.rank > 0 || band.worker > 0)) return "";
  const ofWorker = worker === EVERY ? "" : isShort ? ` w${worker}` : `, worker ${worker}`;
  return isShort ? `r${rank}${ofWorker}` : `rank ${rank}${ofWorker}`;
}

const WORDS: Record<StepName, string> = {
  query: "tile",
  chunks: "chunk",
  ioBatches: "IO batch",
  miniBatches: "mini-batch",
};

/** Tell the way of a row, for instance "Row 17: tile 3 of 8 → chunk 2 of 16 → …". */
export function wayOf(epoch: Epoch, places: Places, row: number): string {
  const ways = STEP_NAMES.map((name) => {
    const step = epoch.steps[name];
    const place = places[name][row];
    if (place < 0) return `in no ${WORDS[name]} that is listed`;
    const group = groupAt(step, place);
    if (name !== "query" && step.rank[group] === NOBODY) return "left out";
    const band = bandOf(step, group);
    const first = step.bands[band].firstGroup;
    const n = (step.bands[band + 1]?.firstGroup ?? step.rank.length) - first;
    return `${WORDS[name]} ${format(group - first + 1)} of ${format(n)}`;
  });
  const step = epoch.steps.miniBatches;
  const place = places.miniBatches[row];
  if (place < 0 || step.rank[groupAt(step, place)] === NOBODY) {
    return `Row ${format(epoch.joinids[row])}: ${ways[0]} → left out of this epoch, so that every rank has as many rows`;
  }
  const group = groupAt(step, place);
  const worker = epoch.workers > 0 ? `, worker ${step.worker[group]}` : "";
  const reader = epoch.ranks > 1 || epoch.workers > 0 ? ` of rank ${step.rank[group]}${worker}` : "";
  return `Row ${format(epoch.joinids[row])}: ${ways.join(" → ")}${reader}`;
}

/** Return the groups of the last step that ranks yield at a time (from 1), one for each rank. */
export function yieldedAt(step: Step, at: number): number[] {
  return step.bands.flatMap(({ firstGroup, rank }, band) => {
    const group = firstGroup + at - 1;
    const end = step.bands[band + 1]?.firstGroup ?? step.rank.length;
    return rank === NOBODY || group >= end ? [] : [group];
  });
}

/** Return how many mini-batches the rank with the most of them yields. */
export function nYielded(step: Step): number {
  return step.bands.reduce((most, { firstGroup, rank }, band) => {
    const end = step.bands[band + 1]?.firstGroup ?? step.rank.length;
    return rank === NOBODY ? most : Math.max(most, end - firstGroup);
  }, 0);
}

/**
 * Return how much of its colour each row keeps at a time: in the first steps what is yielded, and what waits in
 * the same IO batches; in the last one what is yielded, and what was before.
 */
export function levelsAt(epoch: Epoch, places: Places, at: number): { early: Uint8Array; last: Uint8Array } | null {
  if (at === 0) return null;
  const [early, last] = [new Uint8Array(epoch.nRows), new Uint8Array(epoch.nRows)];
  const { ioBatches, miniBatches } = epoch.steps;
  const groups = yieldedAt(miniBatches, at);
  for (const group of groups) {
    const windows = new Set<number>();
    for (const row of rowsOf(miniBatches, group)) windows.add(groupAt(ioBatches, places.ioBatches[row]));
    for (const window of windows) for (const row of rowsOf(ioBatches, window)) early[row] = 1;
  }
  for (let earlier = 1; earlier < at; earlier++) {
    for (const group of yieldedAt(miniBatches, earlier)) for (const row of rowsOf(miniBatches, group)) last[row] = 1;
  }
  for (const group of groups) for (const row of rowsOf(miniBatches, group)) early[row] = last[row] = 2;
  return { early, last };
}

function rowsOf(step: Step, group: number): Int32Array {
  return step.rows.subarray(step.starts[group], step.starts[group + 1]);
}

function bandOf(step: Step, group: number): number {
  return step.bands.findLastIndex(({ firstGroup }) => firstGroup <= group);
}

function format(n: number): string {
  return n.toLocaleString("en");
}
