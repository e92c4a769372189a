import { useEffect, useLayoutEffect, useMemo, useRef, useState, type KeyboardEvent, type PointerEvent } from "react";
import { STEP_NAMES, type Epoch, type StepName } from "../order/epoch";
import type { Palette } from "../picture/colours";
import { bandName, groupAt, wayOf, type Places } from "../picture/follow";
import { layoutOf, placeAt, placeBeyond, type Layout } from "../picture/layout";
import { paint } from "../picture/paint";
import { whole } from "./format";

interface Props {
  epoch: Epoch;
  places: Places;
  palette: Palette;
  levels: { early: Uint8Array; last: Uint8Array } | null;
  row: number | null;
  onFollow: (row: number | null) => void;
  onPin: (row: number | null) => void;
}

const TITLES: Record<StepName, { title: string; text: string; unit: string }> = {
  query: { title: "Query rows", text: "in the order in which they are stored, tile by tile", unit: "tile" },
  chunks: { title: "Shuffle chunks", text: "neighbours that stay together, in random order", unit: "chunk" },
  ioBatches: { title: "IO batches", text: "read together, then permuted row by row", unit: "IO batch" },
  miniBatches: { title: "Mini-batches", text: "what each rank yields, from left to right", unit: "mini-batch" },
};


/** The four steps, one above the other; the row that is followed is ringed in each. */
export function Steps(props: Props) {
  const { epoch, places, row } = props;
  const container = useRef<HTMLDivElement>(null);
  const boxes = useRef<Partial<Record<StepName, HTMLDivElement | null>>>({});
  const { width, ratio } = useSize(container);
  const layouts = useMemo(() => layoutsOf(epoch, width, ratio), [epoch, width, ratio]);
  const path = usePath(row, places, layouts, boxes, ratio);
  return (
    <div className="steps" ref={container}>
      {STEP_NAMES.map((name, k) => (
        <section key={name} className="step" aria-label={TITLES[name].title}>
          <h3>
            <span className="number">{k + 1}</span> {TITLES[name].title}
            <small>
              {" "}
              {countOf(epoch, name)}: {TITLES[name].text}
            </small>
          </h3>
          <div className="cells" ref={(box) => void (boxes.current[name] = box)}>
            {layouts && <StepCanvas {...props} name={name} layout={layouts[name]} ratio={ratio} />}
          </div>
        </section>
      ))}
      {path.length > 1 && (
        <svg className="way" aria-hidden="true">
          <polyline points={path.map(({ x, y }) => `${x},${y}`).join(" ")} />
        </svg>
      )}
    </div>
  );
}

function StepCanvas(props: Props & { name: StepName; layout: Layout; ratio: number }) {
  const { epoch, places, palette, levels, row, name, layout, ratio, onFollow, onPin } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const step = epoch.steps[name];
  useLayoutEffect(() => {
    if (!canvas.current) return;
    paint(canvas.current, {
      step,
      layout,
      palette,
      levels: levels && (name === "miniBatches" ? levels.last : levels.early),
      joinids: epoch.joinids,
      names: step.bands.map((_, band) => bandName(step, band, true)),
      ratio,
      ink: getComputedStyle(canvas.current).color,
    });
  }, [step, layout, palette, levels, epoch, ratio, name]);

  const place = row === null ? -1 : places[name][row];
  const follow = (to: number) => onPin(step.rows[Math.max(0, Math.min(step.rows.length - 1, to))]);
  const rowUnder = (event: PointerEvent) => {
    const box = event.currentTarget.getBoundingClientRect();
    return step.rows[placeAt(layout, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio)];
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const from = place < 0 ? 0 : place;
    const group = groupAt(step, from);
    const moves: Record<string, () => number | null> = {
      ArrowLeft: () => from - 1,
      ArrowRight: () => (place < 0 ? 0 : from + 1),
      ArrowUp: () => placeBeyond(layout, from, -1),
      ArrowDown: () => placeBeyond(layout, from, 1),
      PageUp: () => step.starts[Math.max(0, group - 1)],
      PageDown: () => step.starts[Math.min(step.rank.length - 1, group + 1)],
      Home: () => 0,
      End: () => step.rows.length - 1,
      Escape: () => null,
    };
    const move = moves[event.key];
    if (!move || step.rows.length === 0) return;
    event.preventDefault();
    const to = move();
    if (to === null) onPin(null);
    else follow(to);
  };
  const side = Math.max(12, layout.cell / ratio + 4);
  return (
    <div
      className="cells-focus"
      role="slider"
      tabIndex={0}
      aria-label={`${TITLES[name].title}: follow a row; arrow keys move by one, page keys by a ${TITLES[name].unit}`}
      aria-valuemin={1}
      aria-valuemax={Math.max(1, step.rows.length)}
      aria-valuenow={Math.max(0, place) + 1}
      aria-valuetext={row === null ? "no row is followed" : wayOf(epoch, places, row)}
      style={{ width: layout.width / ratio, height: layout.height / ratio }}
      onKeyDown={onKeyDown}
      onFocus={(event) => row === null && step.rows.length > 0 && event.currentTarget.matches(":focus-visible") && follow(0)}
      onPointerMove={(event) => event.pointerType !== "touch" && onFollow(rowUnder(event))}
      onPointerLeave={() => onFollow(null)}
      onClick={(event) => onPin(rowUnder(event as unknown as PointerEvent))}
    >
      <canvas ref={canvas} aria-hidden="true" style={{ width: layout.width / ratio, height: layout.height / ratio }} />
      {place >= 0 && (
        <div
          className="ring"
          style={{
            width: side,
            height: side,
            transform: `translate(${(layout.x[place] + layout.cell / 2) / ratio - side / 2}px, ${(layout.y[place] + layout.cell / 2) / ratio - side / 2}px)`,
          }}
        />
      )}
    </div>
  );
}

function layoutsOf(epoch: Epoch, width: number, ratio: number): Record<StepName, Layout> | null {
  if (width < 50) return null;
  const names = STEP_NAMES.flatMap((name) => epoch.steps[name].bands.map((_, k) => bandName(epoch.steps[name], k, true)));
  const longest = Math.max(...names.map((name) => name.length));
  const gutter = longest === 0 ? 0 : Math.round((longest * 6.4 + 8) * ratio);
  const mostHigh = Math.max(170, width / 12);
  const layouts = {} as Record<StepName, Layout>;
  for (const name of STEP_NAMES) {
    layouts[name] = layoutOf(epoch.steps[name], Math.floor(width * ratio), gutter, mostHigh * ratio, ratio);
  }
  return layouts;
}

function countOf(epoch: Epoch, name: StepName): string {
  const { rank, rows, bands } = epoch.steps[name];
  if (name === "query") return `${whole(rows.length)} rows in ${whole(rank.length)} ${rank.length === 1 ? "tile" : "tiles"}`;
  const isLeft = bands.length > 0 && bands[bands.length - 1].rank < 0;
  const n = isLeft ? bands[bands.length - 1].firstGroup : rank.length;
  return whole(n);
}

/** The width of an element in CSS pixels, and how many pixels of the device one of these is. */
function useSize(element: React.RefObject<HTMLElement | null>): { width: number; ratio: number } {
  const [size, setSize] = useState({ width: 0, ratio: 1 });
  useEffect(() => {
    const measure = () => {
      const width = Math.floor(element.current?.clientWidth ?? 0);
      setSize((old) => (old.width === width && old.ratio === devicePixelRatio ? old : { width, ratio: devicePixelRatio }));
    };
    const observer = new ResizeObserver(measure);
    observer.observe(element.current!);
    measure();
    return () => observer.disconnect();
  }, [element]);
  return size;
}

/** Points of the line from step to step. */
function usePath(
  row: number | null,
  places: Places,
  layouts: Record<StepName, Layout> | null,
  boxes: React.RefObject<Partial<Record<StepName, HTMLDivElement | null>>>,
  ratio: number,
): { x: number; y: number }[] {
  const [path, setPath] = useState<{ x: number; y: number }[]>([]);
  useLayoutEffect(() => {
    if (row === null || !layouts) return setPath([]);
    setPath(
      STEP_NAMES.flatMap((name) => {
        const [place, box, layout] = [places[name][row], boxes.current[name], layouts[name]];
        if (!box || place === undefined || place < 0) return [];
        const middle = layout.cell / 2;
        return [
          {
            x: box.offsetLeft + (layout.x[place] + middle) / ratio,
            y: box.offsetTop + (layout.y[place] + middle) / ratio,
          },
        ];
      }),
    );
  }, [row, places, layouts, boxes, ratio]);
  return path;
}
