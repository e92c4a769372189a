/** Draws a step on a canvas. */

import { NOBODY, type Step } from "../order/epoch";
import type { Palette } from "./colours";
import type { Layout } from "./layout";

export interface Painting {
  step: Step;
  layout: Layout;
  palette: Palette;
  /** 0, 1 or 2 for each row: how much of its colour it keeps; all of it if null. */
  levels: Uint8Array | null;
  joinids: Float64Array;
  /** A short name of each band, drawn at its left. */
  names: string[];
  ratio: number;
  ink: string;
}

/** Draw all cells, a hundred thousand within a few milliseconds. */
export function paint(canvas: HTMLCanvasElement, painting: Painting): void {
  const { layout, step } = painting;
  canvas.width = layout.width;
  canvas.height = layout.height;
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(layout.width, layout.height);
  fillCells(new Uint32Array(image.data.buffer), painting);
  context.putImageData(image, 0, 0);
  drawNumbers(context, painting);
  drawNames(context, painting);
  markLeftOut(context, step, layout, painting.ink);
}

function fillCells(pixels: Uint32Array, { step, layout, palette, levels, ratio }: Painting): void {
  const { cell, width, x, y } = layout;
  const side = cell >= 5 * ratio ? cell - Math.max(1, Math.round(ratio)) : cell;
  for (let place = 0; place < step.rows.length; place++) {
    const row = step.rows[place];
    const colour = palette.pixels[levels ? levels[row] : 2][palette.of(row)];
    const corner = y[place] * width + x[place];
    if (side === 1) {
      pixels[corner] = colour;
      continue;
    }
    for (let line = 0; line < side; line++) {
      const start = corner + line * width;
      pixels.fill(colour, start, start + side);
    }
  }
}

function drawNumbers(context: CanvasRenderingContext2D, painting: Painting): void {
  const { step, layout, palette, levels, joinids, ratio, ink } = painting;
  const size = layout.cell * 0.42;
  if (layout.cell < 20 * ratio || joinids.at(-1)! > 9999) return;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let place = 0; place < step.rows.length; place++) {
    const row = step.rows[place];
    const isFull = !levels || levels[row] === 2;
    context.fillStyle = isFull ? (palette.isLight[palette.of(row)] ? "#111" : "#fff") : ink;
    const middle = layout.cell / 2 - ratio / 2;
    context.fillText(String(joinids[row]), layout.x[place] + middle, layout.y[place] + middle + ratio / 2);
  }
}

function drawNames(context: CanvasRenderingContext2D, { layout, names, ratio, ink }: Painting): void {
  context.font = `${11 * ratio}px system-ui, sans-serif`;
  context.textAlign = "left";
  context.fillStyle = ink;
  let free = -Infinity;
  layout.bands.forEach(({ top, bottom }, k) => {
    const height = Math.min(bottom - top, layout.cell);
    const middle = bottom - top > 2 * layout.cell ? top + 7 * ratio : top + height / 2;
    if (!names[k] || middle - 6 * ratio < free) return;
    context.textBaseline = "middle";
    context.fillText(names[k], 0, Math.max(6 * ratio, middle));
    free = middle + 6 * ratio;
  });
}

/** Strike through what nobody reads: colour alone would not tell. */
function markLeftOut(context: CanvasRenderingContext2D, step: Step, layout: Layout, ink: string): void {
  context.strokeStyle = ink;
  context.lineWidth = Math.max(1, layout.cell / 10);
  step.rank.forEach((rank, group) => {
    if (rank !== NOBODY || step.bands.length < 2) return;
    for (let place = step.starts[group]; place < step.starts[group + 1]; place++) {
      const [x, y] = [layout.x[place], layout.y[place]];
      context.beginPath();
      context.moveTo(x, y + layout.cell);
      context.lineTo(x + layout.cell, y);
      context.stroke();
    }
  });
}
