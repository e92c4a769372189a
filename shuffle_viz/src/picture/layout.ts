/** Where each cell of a step is drawn, in device pixels. */

import type { Step } from "../order/epoch";

export interface Layout {
  width: number;
  height: number;
  /** Side of a cell. */
  cell: number;
  /** Corner of the cell at each place. */
  x: Int32Array;
  y: Int32Array;
  /** The first place of each line. */
  lines: Int32Array;
  /** Top and bottom of each band. */
  bands: { top: number; bottom: number }[];
}

const CELLS = [30, 26, 22, 18, 15, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1];

/** Return the layout with the largest cells that is no higher than `most`, if any is. */
export function layoutOf(step: Step, width: number, gutter: number, most: number, ratio: number): Layout {
  const sizes = [...new Set(CELLS.map((cell) => Math.max(1, Math.round(cell * ratio))))];
  const fitting = sizes.filter((cell) => (step.rows.length / Math.max(1, width - gutter)) * cell * cell <= most);
  for (const cell of fitting) {
    const layout = laidOut(step, width, gutter, cell);
    if (layout.height <= most) return layout;
  }
  return laidOut(step, width, gutter, 1);
}

/** Return the place that is drawn nearest to a point. */
export function placeAt(layout: Layout, x: number, y: number): number {
  const line = lastAtMost(layout.lines, (first) => layout.y[first] <= y);
  const start = layout.lines[line] ?? 0;
  const stop = layout.lines[line + 1] ?? layout.x.length;
  let found = start;
  for (let low = start, high = stop; low < high; ) {
    const middle = (low + high) >> 1;
    if (layout.x[middle] <= x) [found, low] = [middle, middle + 1];
    else high = middle;
  }
  return found;
}

/** Return the place above or below another one. */
export function placeBeyond(layout: Layout, place: number, nLines: number): number {
  const line = lastAtMost(layout.lines, (first) => first <= place) + nLines;
  const to = layout.lines[Math.max(0, Math.min(layout.lines.length - 1, line))];
  return placeAt(layout, layout.x[place], layout.y[to]);
}

/** Return the last index for which something holds that holds for the first ones; 0 if for none. */
function lastAtMost(items: Int32Array, holds: (item: number) => boolean): number {
  let found = 0;
  for (let low = 0, high = items.length; low < high; ) {
    const middle = (low + high) >> 1;
    if (holds(items[middle])) [found, low] = [middle, middle + 1];
    else high = middle;
  }
  return found;
}

function laidOut(step: Step, width: number, gutter: number, cell: number): Layout {
  const n = step.rows.length;
  const [xs, ys] = [new Int32Array(n), new Int32Array(n)];
  const lines: number[] = [];
  const bands: Layout["bands"] = [];
  const nGroups = step.rank.length;
  const gap = gapOf(cell, n / Math.max(1, nGroups), width - gutter);
  const lineGap = cell >= 8 ? Math.round(cell / 4) : 0;
  let y = 0;
  step.bands.forEach((band, k) => {
    const lastGroup = step.bands[k + 1]?.firstGroup ?? nGroups;
    const top = y;
    let x = gutter;
    const newLine = (place: number) => {
      if (x > gutter) y += cell + lineGap;
      x = gutter;
      lines.push(place);
    };
    newLine(step.starts[band.firstGroup]);
    for (let group = band.firstGroup; group < lastGroup; group++) {
      const [start, stop] = [step.starts[group], step.starts[group + 1]];
      if (x > gutter) {
        const isKept = cell >= 8 && (stop - start) * cell <= (width - gutter) / 2;
        const needed = isKept ? (stop - start) * cell : cell;
        if (x + gap + needed > width) newLine(start);
        else x += gap;
      }
      for (let place = start; place < stop; place++) {
        if (x + cell > width && x > gutter) newLine(place);
        xs[place] = x;
        ys[place] = y;
        x += cell;
      }
    }
    y += cell;
    bands.push({ top, bottom: y });
    y += Math.max(2, lineGap * 2);
  });
  const height = Math.max(1, bands.at(-1)?.bottom ?? 1);
  return { width, height, cell, x: xs, y: ys, lines: Int32Array.from(lines), bands };
}

/** Room before a group: none where groups are too small to be seen apart, or longer than a line. */
function gapOf(cell: number, rowsPerGroup: number, width: number): number {
  if (cell >= 8) return Math.round(cell / 2.5);
  if (cell * rowsPerGroup < 8 || cell * rowsPerGroup > width) return 0;
  return cell >= 4 ? 3 : cell >= 2 ? 2 : 1;
}
