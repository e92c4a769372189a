import { memo } from "react";
import { bestMixing, bytesPerRow, chunkSizes, nParts, predict, predictAuto, SNAPSHOT_NS, type Query, type Way } from "../predict";
import type { Settings } from "../settings";
import { Chart } from "./Chart";
import { NumberInput } from "./Controls";
import { bytes, decimal, percent, rate, times, whole } from "./format";

interface Props {
  settings: Settings;
  onChange: (settings: Settings) => void;
}

/** What a chunk size costs at the size of the user's own query, and which one to take. */
export const TradeOff = memo(function TradeOff({ settings, onChange }: Props) {
  const query: Query = { ...settings, rows: settings.query };
  const yours = predict(query, settings.chunk, settings.ioBatch);
  const auto = predictAuto(query);
  const snapshotRate = 1e9 / (settings.nonZeros * SNAPSHOT_NS);
  const curve = (window: number) => chunkSizes(query, window).map((chunk) => predict(query, chunk, window));
  return (
    <section className="card tradeoff" aria-labelledby="tradeoff">
      <h2 id="tradeoff">Which chunk size, and why</h2>
      <Advice {...{ settings, query, yours, auto, snapshotRate }} />
      <div className="fields assumptions">
        {(["query", "nonZeros", "budget", "scanNs"] as const).map((name) => (
          <NumberInput key={name} name={name} settings={settings} onChange={onChange} />
        ))}
      </div>
      <Chart yours={yours} auto={auto} curve={curve(settings.ioBatch)} autoCurve={curve(auto.window)} snapshotRate={snapshotRate} tile={settings.tile} />
      <Comparison {...{ settings, query, yours, auto, snapshotRate }} />
      <p className="note">
        Predicted: rows/s = 1 / (non-zeros a row × {decimal(settings.scanNs)} ns × tiles decoded). 19 ns is what TileDB took for a
        non-zero on two cores, reading aligned runs of whole tiles of {whole(2048)} × {whole(2048)} (zstd, page cache warm); a
        snapshot took {SNAPSHOT_NS} ns. Measured on 500,000 simulated cells with 490 non-zeros each. Remote storage, dense
        mini-batches and your model take their own time; rows/s are those of one reading process. Mixing is that of a rank’s mini-batch beside
        a random one of the whole query. It is predicted for labels of log-normal size that are stored one after the other, like the data sets of the
        Census. “auto” counts 3 bytes a non-zero while a row waits.
      </p>
    </section>
  );
});

interface Figures {
  settings: Settings;
  query: Query;
  yours: Way;
  auto: Way;
  snapshotRate: number;
}

/** The answer in words. */
function Advice({ settings, query, yours, auto, snapshotRate }: Figures) {
  const gain = auto.rowsPerS / yours.rowsPerS;
  const mixes = auto.mixing >= yours.mixing - 0.01 ? "mixes as well or better" : `mixes less (${percent(auto.mixing)})`;
  const verdict =
    gain > 1.1
      ? `is ${times(gain)} times as fast and ${mixes}`
      : gain < 0.9
        ? `is slower (${times(1 / gain)} times), because it ${auto.mixing > yours.mixing + 0.01 ? `mixes better: ${percent(auto.mixing)}` : "keeps mixing up"}`
        : `is about as fast and ${mixes}`;
  return (
    <div className="advice">
      <p>
        TileDB decodes whole tiles of {whole(settings.tile)} rows. With chunks of <b>{whole(yours.chunk)}</b> in windows of{" "}
        <b>{whole(yours.window)}</b> rows, and reads of {whole(yours.readRows)}, every tile of a query of {whole(settings.query)} rows is decoded{" "}
        <b>{times(yours.amplification)} times</b> an epoch: <b>{rate(yours.rowsPerS)} rows/s</b> at most, mixed to{" "}
        <b>{percent(yours.mixing)}</b> of a full shuffle.
      </p>
      <ul>
        <li>
          <b>Larger chunks are faster, up to the tile; smaller ones mix better.</b> What buys both is memory: where it
          holds the query, every tile is decoded once, whatever the chunk; a larger window holds more chunks.
        </li>
        <li>
          <b>“auto”</b> does that: with {decimal(settings.budget)} GiB it takes chunks of <b>{whole(auto.chunk)}</b> in windows of{" "}
          {whole(auto.window)} rows, and {verdict}: <b>{rate(auto.rowsPerS)} rows/s</b>.
        </li>
        <li>
          <b>More than one epoch?</b> A snapshot on local disk has no tiles: about <b>{rate(snapshotRate)} rows/s</b> with any
          chunk, even single rows.
        </li>
        {nParts(query) > 1 && (
          <li>
            <b>Each of {whole(nParts(query))} parts is shuffled by itself</b>, so no size mixes better than{" "}
            {percent(bestMixing(query))}: <code>shuffle_scope="global"</code> mixes the whole query.
          </li>
        )}
        {settings.scope === "global" && auto.amplification > 1.5 && settings.ranks * Math.max(1, settings.workers) > 1 && (
          <li>
            <b>Ranks and workers need rows of the same tiles</b>: with “auto”, every tile is decoded {times(auto.amplification)} times
            an epoch in all. A snapshot has no tiles.
          </li>
        )}
      </ul>
    </div>
  );
}

function Comparison({ settings, query, yours, auto, snapshotRate }: Figures) {
  const memory = ({ readRows }: Way) => bytes(readRows * bytesPerRow(settings.nonZeros));
  const rows: [string, (way: Way) => string, string][] = [
    ["Rows/s", (way) => rate(way.rowsPerS), rate(snapshotRate)],
    ["Mixing", (way) => percent(way.mixing), percent(bestMixing(query))],
    ["Tiles decoded", (way) => `${times(way.amplification)} ×`, "none"],
    ["Chunk", (way) => whole(way.chunk), "any"],
    ["Window, rows", (way) => whole(way.window), "any"],
    ["Read at once, rows", (way) => whole(way.readRows), "any"],
    ["Memory", memory, "cache"],
  ];
  return (
    <div className="scroll" tabIndex={0} role="region" aria-label="Ways to read, compared">
      <table>
        <thead>
          <tr>
            <td />
            <th scope="col">As set</th>
            <th scope="col">“auto”</th>
            <th scope="col">Snapshot</th>
          </tr>
        </thead>
        <tbody>
          {rows.map(([title, of, ofSnapshot]) => (
            <tr key={title}>
              <th scope="row">{title}</th>
              <td>{of(yours)}</td>
              <td>{of(auto)}</td>
              <td>{ofSnapshot}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
