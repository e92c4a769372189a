import { expect, test } from "vitest";
import { NOBODY, orderOf, type Setup } from "../src/order/epoch";
import { labelsOf, logFactorial, qualityOf } from "../src/order/quality";

const SETUP: Setup = { rows: 8, chunk: 2, ioBatch: 4, miniBatch: 2, ranks: 1, workers: 0, scope: "partition", seed: 0n, epoch: 0, tile: 4 };

test("factorials, and what lies between them", () => {
  let sum = 0;
  for (let n = 1; n <= 40; n++) expect(logFactorial(n)).toBeCloseTo((sum += Math.log(n)), 9);
  expect(logFactorial(0)).toBeCloseTo(0, 9);
  expect(logFactorial(0.5)).toBeCloseTo(Math.log(Math.sqrt(Math.PI) / 2), 9);
});

/** All orders that random chunk orders and random permutations of IO batches can give. */
function allOrders(n: number, chunk: number, ioBatch: number): Set<string> {
  const permutations = (items: number[]): number[][] =>
    items.length < 2 ? [items] : items.flatMap((item, k) => permutations(items.toSpliced(k, 1)).map((rest) => [item, ...rest]));
  const chunks = Array.from({ length: Math.ceil(n / chunk) }, (_, k) => k);
  const found = new Set<string>();
  for (const order of permutations(chunks)) {
    const rows = order.flatMap((k) => Array.from({ length: Math.min(chunk, n - k * chunk) }, (_, i) => k * chunk + i));
    let partial = [[] as number[]];
    for (let start = 0; start < n; start += ioBatch) {
      const batches = permutations(rows.slice(start, start + ioBatch));
      partial = partial.flatMap((before) => batches.map((batch) => [...before, ...batch]));
    }
    for (const whole of partial) found.add(whole.join());
  }
  return found;
}

test.each([
  [8, 2, 4],
  [6, 2, 2],
  [6, 1, 3],
  [6, 3, 6],
  [8, 1, 2],
])("shuffle entropy of %i rows in chunks of %i and IO batches of %i counts all orders", (rows, chunk, ioBatch) => {
  const epoch = orderOf({ ...SETUP, rows, chunk, ioBatch });
  const { orderBits, fullOrderBits } = qualityOf(epoch, new Int32Array(rows));
  expect(2 ** orderBits).toBeCloseTo(allOrders(rows, chunk, ioBatch).size, 4);
  expect(fullOrderBits).toBeCloseTo(logFactorial(rows) / Math.LN2, 9);
});

test("chunks of one row are a full shuffle, in one part and globally, and parts are less", () => {
  const share = (setup: Partial<Setup>) => {
    const { orderBits, fullOrderBits } = qualityOf(orderOf({ ...SETUP, rows: 96, chunk: 1, ioBatch: 8, ...setup }), new Int32Array(96));
    return orderBits / fullOrderBits;
  };
  expect(share({})).toBeCloseTo(1, 9);
  expect(share({ ranks: 4, scope: "global" })).toBeCloseTo(1, 9);
  expect(share({ ranks: 4 })).toBeLessThan(0.8);
  expect(share({ chunk: 4 })).toBeLessThan(1);
});

test("tiles, labels and entropy are those of the rows of each mini-batch", () => {
  const epoch = orderOf({ ...SETUP, rows: 101, ranks: 3, miniBatch: 7 });
  const labels = labelsOf(101, 5, "sorted");
  const quality = qualityOf(epoch, labels);
  const { miniBatches } = epoch.steps;
  quality.mixes.forEach((mix, group) => {
    const rows = [...miniBatches.rows.subarray(miniBatches.starts[group], miniBatches.starts[group + 1])];
    const counts = [...new Set(rows.map((row) => labels[row]))].map((label) => rows.filter((row) => labels[row] === label).length);
    expect(mix.tiles).toBe(new Set(rows.map((row) => Math.floor(row / 4))).size);
    expect(mix.labels).toBe(counts.length);
    expect(mix.entropyBits).toBeCloseTo(-counts.reduce((sum, n) => sum + (n / rows.length) * Math.log2(n / rows.length), 0), 9);
  });
  expect(quality.nLeftOut).toBe(2);
  expect(miniBatches.rank.filter((rank) => rank === NOBODY)).toHaveLength(1);
});

test("an IO batch decodes each of its tiles once", () => {
  const { tilesDecoded, nTiles } = qualityOf(orderOf({ ...SETUP, rows: 64, chunk: 4, ioBatch: 64 }), new Int32Array(64));
  expect([tilesDecoded, nTiles]).toEqual([16, 16]);
  expect(qualityOf(orderOf({ ...SETUP, rows: 64, chunk: 1, ioBatch: 1 }), new Int32Array(64)).tilesDecoded).toBe(64);
});

test("labels cover all rows, sorted or not, and random ones mix better", () => {
  for (const [rows, n] of [[1, 900], [64, 4], [1000, 900], [5000, 7]]) {
    const sorted = labelsOf(rows, n, "sorted");
    expect([...sorted]).toEqual([...sorted].sort((a, b) => a - b));
    expect([...labelsOf(rows, n, "random")].sort((a, b) => a - b)).toEqual([...sorted]);
    expect(new Set(sorted).size).toBeLessThanOrEqual(Math.min(n, rows));
  }
  const epoch = orderOf({ ...SETUP, rows: 4096, chunk: 64, ioBatch: 256, miniBatch: 64 });
  const bits = (order: "sorted" | "random") => qualityOf(epoch, labelsOf(4096, 20, order)).mean.entropyBits;
  expect(bits("sorted")).toBeLessThan(0.8 * bits("random"));
});
