import { useEffect, useState } from "react";
import { whole } from "./format";

interface Props {
  at: number;
  last: number;
  text: string;
  onChange: (at: number) => void;
}

/** Goes through the mini-batches of an epoch: play, pause, one on, one back, and a slider. */
export function Player({ at, last, text, onChange }: Props) {
  const [isPlaying, setIsPlaying] = useState(false);
  useEffect(() => {
    if (!isPlaying) return;
    if (at >= last) return setIsPlaying(false);
    const timer = setTimeout(() => onChange(Math.min(last, at + Math.max(1, Math.round(last / 200)))), 450);
    return () => clearTimeout(timer);
  }, [isPlaying, at, last, onChange]);
  const toggle = () => {
    if (!isPlaying && at >= last) onChange(1);
    setIsPlaying(!isPlaying);
  };
  return (
    <div className="player" role="group" aria-label="Step through the epoch">
      <button type="button" className="play" onClick={toggle} aria-label={isPlaying ? "Pause" : "Play"}>
        <svg viewBox="0 0 10 10" aria-hidden="true">
          <path d={isPlaying ? "M1 0h3v10H1zM6 0h3v10H6z" : "M1 0l9 5-9 5z"} />
        </svg>
      </button>
      <button type="button" aria-label="Previous mini-batch" disabled={at === 0} onClick={() => onChange(at - 1)}>
        ‹
      </button>
      <input
        type="range"
        aria-label="Mini-batch"
        min={0}
        max={last}
        value={Math.min(at, last)}
        aria-valuetext={at === 0 ? "whole epoch" : `mini-batch ${at} of ${last}`}
        onChange={(event) => onChange(Number(event.target.value))}
      />
      <button type="button" aria-label="Next mini-batch" disabled={at >= last} onClick={() => onChange(at + 1)}>
        ›
      </button>
      <output aria-live={isPlaying ? "off" : "polite"}>
        <strong>{at === 0 ? "Whole epoch" : `Mini-batch ${whole(at)} of ${whole(last)}`}</strong> {text}
      </output>
    </div>
  );
}
