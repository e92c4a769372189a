import { useCallback, useEffect, useMemo, useRef, useState, type DragEvent } from "react";
import { orderOf } from "./order/epoch";
import { labelsOf, qualityOf, tileOfRows, type Mix, type Quality } from "./order/quality";
import { gradientCss, paletteOf } from "./picture/colours";
import { levelsAt, nYielded, placesOf, wayOf, yieldedAt } from "./picture/follow";
import { readPlan, type PlanFile } from "./planFile";
import { fromAddress, toAddress, type Settings } from "./settings";
import { Controls } from "./ui/Controls";
import { decimal, whole } from "./ui/format";
import { Numbers } from "./ui/Numbers";
import { Player } from "./ui/Player";
import { Steps } from "./ui/Steps";
import { TradeOff } from "./ui/TradeOff";
import { useTheme } from "./ui/useTheme";
import { Who } from "./ui/Who";

/** The page: settings, the order of an epoch in four steps, and what it is worth. */
export function App() {
  const [initial] = useState(() => fromAddress(location.hash));
  const [settings, setSettings] = useState(initial.settings);
  const [problems, setProblems] = useState(initial.problems);
  const [at, setAt] = useState(initial.at);
  const [pinned, setPinned] = useState(initial.row);
  const [hovered, setHovered] = useState<number | null>(null);
  const [plan, setPlan] = useState<PlanFile | null>(null);
  const [theme, setTheme] = useTheme();

  const { rows, chunk, ioBatch, miniBatch, ranks, workers, scope, seed, epoch: number, tile } = settings;
  const computed = useMemo(
    () => orderOf({ rows, chunk, ioBatch, miniBatch, ranks, workers, scope, seed, epoch: number, tile }),
    [rows, chunk, ioBatch, miniBatch, ranks, workers, scope, seed, number, tile],
  );
  const epoch = plan?.epoch ?? computed;
  const places = useMemo(() => placesOf(epoch), [epoch]);
  const tiles = useMemo(() => tileOfRows(epoch.steps.query), [epoch]);
  const labels = useMemo(
    () => labelsOf(epoch.nRows, settings.labels, settings.labelOrder),
    [epoch.nRows, settings.labels, settings.labelOrder],
  );
  const quality = useMemo(() => qualityOf(epoch, labels), [epoch, labels]);
  const palette = useMemo(
    () => paletteOf(settings.colour, epoch.nRows, tiles, labels, theme),
    [settings.colour, epoch.nRows, tiles, labels, theme],
  );
  const last = nYielded(epoch.steps.miniBatches);
  const moment = Math.min(at, last);
  const levels = useMemo(() => levelsAt(epoch, places, moment), [epoch, places, moment]);
  const isThere = (row: number | null) => (row !== null && row < epoch.nRows ? row : null);
  const row = isThere(hovered) ?? isThere(pinned);

  const change = useCallback((changed: Settings) => {
    setSettings(changed);
    setProblems([]);
    setHovered(null);
    setPlan(null);
  }, []);
  const changeTradeOff = useCallback(
    ({ query, nonZeros, budget, scanNs }: Settings) =>
      setSettings((old) => ({ ...old, query, nonZeros, budget, scanNs })),
    [],
  );
  useAddress(toAddress(settings, moment, plan ? null : pinned), (hash) => {
    const found = fromAddress(hash);
    setSettings(found.settings);
    setProblems(found.problems);
    setAt(found.at);
    setPinned(found.row);
    setPlan(null);
  });
  const drop = usePlanDrop((found) => {
    setPlan(found);
    setSettings((old) => ({ ...old, query: found.nRows }));
    setAt(0);
    setPinned(null);
    setHovered(null);
  });

  const now = useMemo(
    () => (moment > 0 ? mixNow(quality, epoch.steps.miniBatches, moment) : null),
    [quality, epoch, moment],
  );
  const shown = useMemo(() => (plan ? { ...settings, ...shownOf(plan) } : settings), [plan, settings]);
  return (
    <div className={drop.isOver ? "page over" : "page"} {...drop.handlers}>
      <header>
        <div>
          <h1>How rows are shuffled</h1>
          <p>
            A query becomes mini-batches in four steps. Every cell is a row; the order is the one that{" "}
            <code>tiledbsoma_ml</code> yields, to the last row.
          </p>
        </div>
        <div className="tools">
          <button type="button" onClick={() => document.getElementById("tradeoff")?.scrollIntoView({ block: "start" })}>
            Which chunk size?
          </button>
          <CopyLink />
          <button type="button" onClick={() => setTheme(theme === "dark" ? "light" : "dark")}>
            {theme === "dark" ? "Light" : "Dark"}
          </button>
        </div>
      </header>
      <main>
        <aside className="card" aria-label="Settings and plans">
          <Controls settings={settings} onChange={change} />
          {problems.map((problem) => (
            <p key={problem} className="error" role="alert">
              In the address: {problem}
            </p>
          ))}
          <PlanBox plan={plan} error={drop.error} onFile={drop.read} onClose={() => setPlan(null)} />
        </aside>
        <div className="column">
          <section className="card picture" aria-labelledby="picture">
            <h2 id="picture">The order of an epoch</h2>
            {plan && <PlanCaption plan={plan} />}
            <Player at={moment} last={last} onChange={setAt} text={momentText(quality, now)} />
            <p className="way-text" aria-live="polite">
              {row === null ? "Point at a cell, or move with the arrow keys, to follow a row." : wayOf(epoch, places, row)}
            </p>
            <Steps {...{ epoch, places, palette, levels, row }} onFollow={setHovered} onPin={setPinned} />
            <Legend colour={settings.colour} isMoment={moment > 0} />
          </section>
          <Numbers quality={quality} now={now} nRows={epoch.nRows} isWhole={plan?.isWhole ?? true} />
          <TradeOff settings={shown} onChange={changeTradeOff} />
          <Who epoch={epoch} at={moment} />
        </div>
      </main>
    </div>
  );
}

function mixNow(quality: Quality, step: Parameters<typeof yieldedAt>[0], at: number): Mix {
  const mixes = yieldedAt(step, at).map((group) => quality.mixes[group]);
  const mean = (of: (mix: Mix) => number) => mixes.reduce((sum, mix) => sum + of(mix), 0) / Math.max(1, mixes.length);
  return { tiles: mean((mix) => mix.tiles), labels: mean((mix) => mix.labels), entropyBits: mean((mix) => mix.entropyBits) };
}

function momentText(quality: Quality, now: Mix | null): string {
  const { tiles, labels, entropyBits } = now ?? quality.mean;
  const who = now ? "mixes" : "a mini-batch mixes";
  const bits = `${decimal(entropyBits)} bits of label entropy, ${decimal(quality.random.entropyBits)} in a full shuffle`;
  const counted = (n: number, word: string) => `${decimal(n)} ${word}${n === 1 ? "" : "s"}`;
  return `${who} ${counted(tiles, "tile")} and ${counted(labels, "label")}: ${bits}`;
}

/** What of a plan the trade-off takes over. */
function shownOf(plan: PlanFile): Partial<Settings> {
  return {
    tile: plan.epoch.tile,
    chunk: plan.chunk,
    ioBatch: plan.ioBatch,
    miniBatch: plan.miniBatch,
  };
}

function Legend({ colour, isMoment }: { colour: Settings["colour"]; isMoment: boolean }) {
  return (
    <p className="legend">
      {colour === "position" ? (
        <>
          first row <span className="gradient" style={{ background: gradientCss() }} aria-hidden="true" /> last row of the query.
        </>
      ) : (
        `Neighbouring ${colour}s have different colours.`
      )}
      {isMoment && " Full colour: the mini-batch of now. Paler: what waits in its IO batch, or was yielded before."}
    </p>
  );
}

function CopyLink() {
  const [text, setText] = useState("Copy link");
  useEffect(() => {
    const timer = setTimeout(() => setText("Copy link"), 2000);
    return () => clearTimeout(timer);
  }, [text]);
  const copy = () =>
    navigator.clipboard.writeText(location.href).then(
      () => setText("Copied"),
      () => setText("Copy it from the address bar"),
    );
  return (
    <button type="button" aria-live="polite" onClick={copy}>
      {text}
    </button>
  );
}

interface PlanBoxProps {
  plan: PlanFile | null;
  error: string | null;
  onFile: (file: File) => void;
  onClose: () => void;
}

function PlanBox({ plan, error, onFile, onClose }: PlanBoxProps) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <div className="plan-box">
      <p>
        <b>A plan of your own:</b> <code>tiledbsoma-ml plan URI --json &gt; plan.json</code>, then drop the file anywhere here.
      </p>
      <button type="button" onClick={() => input.current?.click()}>
        Open a plan…
      </button>
      {plan && (
        <button type="button" onClick={onClose}>
          Close the plan
        </button>
      )}
      <input
        ref={input}
        type="file"
        accept=".json,application/json"
        hidden
        aria-label="Plan file"
        onChange={(event) => {
          const file = event.target.files?.[0];
          if (file) onFile(file);
          event.target.value = "";
        }}
      />
      {error && (
        <p className="error" role="alert">
          {error}
        </p>
      )}
    </div>
  );
}

function PlanCaption({ plan }: { plan: PlanFile }) {
  const listed = plan.isWhole ? "all rows" : `the first ${whole(plan.epoch.nRows)} of ${whole(plan.nRows)} rows`;
  return (
    <p className="plan-caption" role="status">
      Drawn as it is in the plan <b>{plan.name}</b> of <code>{plan.caption}</code>: {listed}. Any change of a setting closes it.
    </p>
  );
}

/** Keep what is shown in the address, and follow the address when it is changed. */
function useAddress(hash: string, onChange: (hash: string) => void): void {
  const written = useRef(location.hash);
  useEffect(() => {
    written.current = hash;
    const timer = setTimeout(() => history.replaceState(null, "", hash), 120);
    return () => clearTimeout(timer);
  }, [hash]);
  useEffect(() => {
    const follow = () => {
      if (location.hash !== written.current) onChange(location.hash);
    };
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  });
}

/** Let files be dropped on the page. What cannot be read is told, and changes nothing. */
function usePlanDrop(onPlan: (plan: PlanFile) => void) {
  const [isOver, setIsOver] = useState(false);
  const [error, setError] = useState<string | null>(null);
  const read = async (file: File) => {
    try {
      onPlan(readPlan(await file.text(), file.name));
      setError(null);
    } catch (problem) {
      setError(`${file.name} cannot be drawn: ${problem instanceof Error ? problem.message : String(problem)}`);
    }
  };
  const handlers = {
    onDragOver: (event: DragEvent) => {
      event.preventDefault();
      setIsOver(true);
    },
    onDragLeave: (event: DragEvent) => event.currentTarget === event.target && setIsOver(false),
    onDrop: (event: DragEvent) => {
      event.preventDefault();
      setIsOver(false);
      const file = event.dataTransfer.files[0];
      if (file) void read(file);
    },
  };
  return { isOver, error, read, handlers };
}
