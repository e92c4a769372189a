import { useEffect, useRef, useState } from "react";
import type { Way } from "../predict";
import { decimal, percent, rate, times, whole } from "./format";

interface Props {
  yours: Way;
  auto: Way;
  curve: Way[];
  autoCurve: Way[];
  snapshotRate: number;
  tile: number;
}

// In units of a fifteenth of the root font size, as the page is drawn larger on very large screens.
const MARGIN = { left: 62, right: 14, top: 40, bottom: 34 };
const HIGH = 226;

/** Speed and mixing against chunk size: a curve for the window that is set, one for that of "auto". */
export function Chart(props: Props) {
  const { yours, auto, curve, autoCurve, snapshotRate } = props;
  const box = useRef<HTMLDivElement>(null);
  const width = useWidth(box);
  const isNarrow = width < 640;
  const each = isNarrow ? width : (width - 24) / 2;
  const rates = [...curve, ...autoCurve, yours, auto].map((way) => way.rowsPerS).concat(snapshotRate);
  const [low, high] = [10 ** Math.floor(Math.log10(Math.min(...rates))), 10 ** Math.ceil(Math.log10(Math.max(...rates)))];
  const powers = Array.from({ length: Math.round(Math.log10(high / low)) + 1 }, (_, k) => low * 10 ** k);
  return (
    <figure className="chart" ref={box}>
      {width > 0 && (
        <div className="panels">
          <Panel
            {...props}
            width={each}
            title="Rows/s, predicted"
            scale={(value) => Math.log(value / low) / Math.log(high / low)}
            of={(way) => way.rowsPerS}
            ticks={powers}
            name={short}
            level={{ value: snapshotRate, name: "snapshot" }}
          />
          <Panel
            {...props}
            width={each}
            title="Mixing, share of a full shuffle"
            scale={(value) => value}
            of={(way) => way.mixing}
            ticks={[0, 0.25, 0.5, 0.75, 1]}
            name={(value) => `${100 * value} %`}
          />
        </div>
      )}
      <figcaption>
        <span className="key as-set">as set: windows of {whole(yours.window)} rows</span>
        <span className="key as-auto">“auto”: windows of {whole(auto.window)} rows</span>
      </figcaption>
      <details>
        <summary>The curves as a table</summary>
        <div className="scroll" tabIndex={0} role="region" aria-label="Curves">
          <table>
            <thead>
              <tr>
                <th scope="col">Chunk</th>
                <th scope="col">Tiles decoded</th>
                <th scope="col">Rows/s</th>
                <th scope="col">Mixing</th>
                <th scope="col">Rows/s, window of auto</th>
                <th scope="col">Mixing, window of auto</th>
              </tr>
            </thead>
            <tbody>
              {autoCurve.map((way, k) => (
                <tr key={way.chunk}>
                  <th scope="row">{whole(way.chunk)}</th>
                  <td>{curve[k] ? `${times(curve[k].amplification)} ×` : "–"}</td>
                  <td>{curve[k] ? rate(curve[k].rowsPerS) : "–"}</td>
                  <td>{curve[k] ? percent(curve[k].mixing) : "–"}</td>
                  <td>{rate(way.rowsPerS)}</td>
                  <td>{percent(way.mixing)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </details>
    </figure>
  );
}

interface PanelProps extends Props {
  width: number;
  title: string;
  /** From 0, at the bottom, to 1. */
  scale: (value: number) => number;
  of: (way: Way) => number;
  ticks: number[];
  name: (value: number) => string;
  level?: { value: number; name: string };
}

function Panel({ yours, auto, curve, autoCurve, tile, width, title, scale, of, ticks, name, level }: PanelProps) {
  const most = Math.max(2, yours.chunk, auto.chunk, tile, ...curve.map((way) => way.chunk), ...autoCurve.map((way) => way.chunk));
  const right = width - MARGIN.right;
  const x = (chunk: number) => MARGIN.left + (Math.log2(chunk) / Math.log2(most)) * (right - MARGIN.left);
  const y = (value: number) => HIGH - MARGIN.bottom - scale(value) * (HIGH - MARGIN.top - MARGIN.bottom);
  const line = (ways: Way[]) => ways.map((way) => `${x(way.chunk).toFixed(1)},${y(of(way)).toFixed(1)}`).join(" ");
  const every = Math.max(1, Math.ceil(Math.log2(most) / (width / 60)));
  const chunks = Array.from({ length: Math.floor(Math.log2(most)) + 1 }, (_, k) => k).filter((k) => k % every === 0);
  const summary = `${title} against chunk size. As set, chunks of ${whole(yours.chunk)}: ${name(of(yours))}; auto, chunks of ${whole(auto.chunk)}: ${name(of(auto))}.`;
  return (
    <svg viewBox={`0 0 ${width} ${HIGH}`} role="img" aria-label={summary}>
      <text className="title" x={0} y={12}>
        {title}
      </text>
      {ticks.map((tick) => (
        <g key={tick}>
          <line className="grid" x1={MARGIN.left} x2={right} y1={y(tick)} y2={y(tick)} />
          <text className="tick" x={MARGIN.left - 6} y={y(tick) + 4} textAnchor="end">
            {name(tick)}
          </text>
        </g>
      ))}
      {chunks.map((k) => (
        <text key={k} className="tick" x={x(2 ** k)} y={HIGH - MARGIN.bottom + 15} textAnchor="middle">
          {short(2 ** k)}
        </text>
      ))}
      <text className="tick" x={right} y={HIGH - 3} textAnchor="end">
        rows in a chunk
      </text>
      <line className="tile" x1={x(tile)} x2={x(tile)} y1={MARGIN.top} y2={HIGH - MARGIN.bottom} />
      <text className="tick" x={x(tile) - 4} y={HIGH - MARGIN.bottom - 5} textAnchor="end">
        tile
      </text>
      {level && (
        <>
          <line className="level" x1={MARGIN.left} x2={right} y1={y(level.value)} y2={y(level.value)} />
          <text className="name" x={MARGIN.left + 4} y={y(level.value) - 5}>
            {level.name}
          </text>
        </>
      )}
      <polyline className="curve as-auto" points={line(autoCurve)} />
      <polyline className="curve as-set" points={line(curve)} />
      <path className="mark as-auto" d="M0-8 8 0 0 8-8 0z" transform={`translate(${x(auto.chunk)} ${y(of(auto))})`} />
      <circle className="mark as-set" r={7} cx={x(yours.chunk)} cy={y(of(yours))} />
      <Name text="as set" at={x(yours.chunk)} y={y(of(yours)) + 21} {...{ right }} />
      <Name text="auto" at={x(auto.chunk)} y={y(of(auto)) - 13} {...{ right }} />
    </svg>
  );
}

function Name({ text, at, y, right }: { text: string; at: number; y: number; right: number }) {
  const middle = Math.max(MARGIN.left + 20, Math.min(right - 20, at));
  return (
    <text className="name" x={middle} y={y} textAnchor="middle">
      {text}
    </text>
  );
}

function short(value: number): string {
  if (value >= 1e6) return `${decimal(value / 1e6)} M`;
  if (value >= 1e4) return `${decimal(value / 1e3)} k`;
  return whole(value) === "0" ? decimal(value) : whole(value);
}

function useWidth(box: React.RefObject<HTMLElement | null>): number {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor((entry.contentRect.width * 15) / rootSize())));
    observer.observe(box.current!);
    return () => observer.disconnect();
  }, [box]);
  return width;
}

function rootSize(): number {
  return parseFloat(getComputedStyle(document.documentElement).fontSize);
}
