import { memo } from "react";
import type { Mix, Quality } from "../order/quality";
import { decimal, percent, plural, times, whole } from "./format";

interface Props {
  quality: Quality;
  /** What is looked at: mini-batches of one moment, or none for the whole epoch. */
  now: Mix | null;
  nRows: number;
  isWhole: boolean;
}

/** What the order that is drawn is worth. */
export const Numbers = memo(function Numbers({ quality, now, nRows, isWhole }: Props) {
  const { mean, random, orderBits, fullOrderBits, nTiles, tilesDecoded, nLeftOut } = quality;
  const share = (value: number, of: number) => (of > 0 ? value / of : 1);
  return (
    <section className="card" aria-labelledby="numbers">
      <h2 id="numbers">What this order is worth</h2>
      <div className="tiles">
        <Figure
          title="Label entropy of a mini-batch"
          value={`${decimal(mean.entropyBits)} bits`}
          share={share(mean.entropyBits, random.entropyBits)}
          text={`of the ${decimal(random.entropyBits)} bits of a full shuffle: this is “mixing”`}
        />
        {isWhole && (
          <Figure
            title="Shuffle entropy"
            value={`${whole(orderBits)} bits`}
            share={share(orderBits, fullOrderBits)}
            text={`of the ${whole(fullOrderBits)} bits of a full shuffle: log₂ of how many orders there can be`}
          />
        )}
        <Figure
          title="Tiles decoded"
          value={`${times(tilesDecoded / Math.max(1, nTiles))} ×`}
          text={`${plural(tilesDecoded, "decoding")} of ${plural(nTiles, "tile")}, as drawn, where memory holds no more than a window`}
        />
      </div>
      <div className="scroll" tabIndex={0} role="region" aria-label="What a mini-batch mixes">
        <table>
          <thead>
            <tr>
              <th scope="col">A mini-batch mixes</th>
              <th scope="col">on average</th>
              {now && <th scope="col">now</th>}
              <th scope="col">full shuffle</th>
            </tr>
          </thead>
          <tbody>
            <Row title="distinct tiles" of={(mix) => mix.tiles} {...{ mean, now, random }} />
            <Row title="distinct labels" of={(mix) => mix.labels} {...{ mean, now, random }} />
            <Row title="label entropy, bits" of={(mix) => mix.entropyBits} {...{ mean, now, random }} />
          </tbody>
        </table>
      </div>
      {nLeftOut > 0 && (
        <p className="note">
          {plural(nLeftOut, "row")} of {whole(nRows)} left out of this epoch, so that every rank yields the same number.
        </p>
      )}
    </section>
  );
});

function Figure({ title, value, share, text }: { title: string; value: string; share?: number; text: string }) {
  return (
    <div className="figure">
      <h3>{title}</h3>
      <p className="value">
        {value} {share !== undefined && <small>{percent(share)}</small>}
      </p>
      {share !== undefined && (
        <div className="bar" aria-hidden="true">
          <div style={{ width: `${Math.min(100, 100 * share)}%` }} />
        </div>
      )}
      <p className="note">{text}</p>
    </div>
  );
}

interface RowProps {
  title: string;
  of: (mix: Mix) => number;
  mean: Mix;
  now: Mix | null;
  random: Mix;
}

function Row({ title, of, mean, now, random }: RowProps) {
  return (
    <tr>
      <th scope="row">{title}</th>
      <td>{decimal(of(mean))}</td>
      {now && <td>{decimal(of(now))}</td>}
      <td>{decimal(of(random))}</td>
    </tr>
  );
}
