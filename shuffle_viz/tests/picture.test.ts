import { expect, test } from "vitest";
import { orderOf, STEP_NAMES, type Setup } from "../src/order/epoch";
import { levelsAt, nYielded, placesOf, wayOf, yieldedAt } from "../src/picture/follow";
import { layoutOf, placeAt, placeBeyond } from "../src/picture/layout";

const SETUP: Setup = { rows: 66, chunk: 4, ioBatch: 16, miniBatch: 4, ranks: 2, workers: 2, scope: "partition", seed: 0n, epoch: 0, tile: 8 };

test.each([
  [64, 300, 1],
  [66, 1200, 2],
  [5000, 700, 1],
  [100_000, 328, 1],
  [100_000, 3000, 2],
])("cells of %i rows on %i pixels (ratio %i) lie beside each other, and each is found under its middle", (rows, width, ratio) => {
  const { steps } = orderOf({ ...SETUP, rows, chunk: 64, ioBatch: 4096, miniBatch: 100, tile: 2048 });
  for (const name of STEP_NAMES) {
    const layout = layoutOf(steps[name], width, 20, 150 * ratio, ratio);
    const taken = new Uint8Array(layout.width * layout.height);
    const wrong = { outside: 0, overlapping: 0, notFound: 0 };
    for (let place = 0; place < steps[name].rows.length; place++) {
      const [x, y] = [layout.x[place], layout.y[place]];
      const isInside = x >= 20 && x + layout.cell <= width && y + layout.cell <= layout.height;
      const corner = y * layout.width + x;
      wrong.outside += isInside ? 0 : 1;
      wrong.overlapping += taken[corner];
      for (let line = 0; line < layout.cell; line++) taken.fill(1, corner + line * layout.width, corner + line * layout.width + layout.cell);
      wrong.notFound += placeAt(layout, x + layout.cell / 2, y + layout.cell / 2) === place ? 0 : 1;
    }
    expect(wrong).toEqual({ outside: 0, overlapping: 0, notFound: 0 });
    expect(placeBeyond(layout, 0, 1)).toBeGreaterThan(0);
    expect(placeBeyond(layout, 0, -1)).toBe(0);
  }
});

test("the way of a row is told, also of one that is left out", () => {
  const epoch = orderOf({ ...SETUP, rows: 67 });
  const places = placesOf(epoch);
  expect(wayOf(epoch, places, 0)).toMatch(/^Row 0: tile 1 of 9 → chunk \d of 5 → IO batch \d of 2 → mini-batch \d of 9 of rank 0, worker 0$/);
  expect(wayOf(epoch, places, 33)).toBe("Row 33: tile 5 of 9 → left out of this epoch, so that every rank has as many rows");
});

test("at every moment each rank yields one mini-batch, until its last", () => {
  const epoch = orderOf({ ...SETUP, scope: "global" });
  const { miniBatches } = epoch.steps;
  const seen = new Set<number>();
  for (let at = 1; at <= nYielded(miniBatches); at++) {
    const groups = yieldedAt(miniBatches, at);
    expect(groups.map((group) => miniBatches.rank[group])).toEqual([0, 1]);
    groups.forEach((group) => seen.add(group));
    const { early, last } = levelsAt(epoch, placesOf(epoch), at)!;
    const rows = groups.flatMap((group) => [...miniBatches.rows.subarray(miniBatches.starts[group], miniBatches.starts[group + 1])]);
    expect([...early.keys()].filter((row) => early[row] === 2)).toEqual(rows.toSorted((a, b) => a - b));
    expect(last.filter((level) => level > 0)).toHaveLength([...seen].reduce((n, group) => n + miniBatches.starts[group + 1] - miniBatches.starts[group], 0));
  }
  expect(seen.size).toBe(miniBatches.rank.length);
});
