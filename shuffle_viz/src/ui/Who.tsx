import { memo } from "react";
import { NOBODY, type Epoch, type Step } from "../order/epoch";
import { yieldedAt } from "../picture/follow";
import { whole } from "./format";

interface Props {
  epoch: Epoch;
  at: number;
}

/** Which worker of which rank reads and yields how much, and whose turn it is. */
export const Who = memo(function Who({ epoch, at }: Props) {
  const { ioBatches, miniBatches } = epoch.steps;
  const now = new Set(at > 0 ? yieldedAt(miniBatches, at).map((group) => key(miniBatches, group)) : []);
  const nWorkers = Math.max(1, epoch.workers);
  const yielded = count(miniBatches);
  const read = count(ioBatches);
  const isShared = epoch.scope === "global" && nWorkers > 1;
  return (
    <section className="card" aria-labelledby="who">
      <h2 id="who">Ranks and workers</h2>
      <div className="scroll who" tabIndex={0} role="region" aria-label="Who reads how much">
        <table>
          <thead>
            <tr>
              <th scope="col">Rank</th>
              <th scope="col">Worker</th>
              <th scope="col">Rows</th>
              <th scope="col">IO batches</th>
              <th scope="col">Mini-batches</th>
              {at > 0 && <th scope="col">Now</th>}
            </tr>
          </thead>
          <tbody>
            {Array.from({ length: epoch.ranks * nWorkers }, (_, k) => {
              const [rank, worker] = [Math.floor(k / nWorkers), k % nWorkers];
              const id = `${rank} ${worker}`;
              const ofRank = read.get(`${rank} -2`)?.groups;
              return (
                <tr key={id} className={now.has(id) ? "now" : undefined}>
                  <th scope="row">{rank}</th>
                  <td>{epoch.workers === 0 ? "itself" : worker}</td>
                  <td>{whole(yielded.get(id)?.rows ?? 0)}</td>
                  <td>{isShared && ofRank !== undefined ? `of ${whole(ofRank)}` : whole(read.get(id)?.groups ?? ofRank ?? 0)}</td>
                  <td>{whole(yielded.get(id)?.groups ?? 0)}</td>
                  {at > 0 && <td>{now.has(id) ? "yields" : "reads on"}</td>}
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <p className="note">{SCOPES[epoch.scope]}</p>
    </section>
  );
});

const SCOPES = {
  partition:
    "Scope “partition”: every worker has a part of the query of its own and shuffles that. A rank never sees what lies in another rank's part.",
  global:
    "Scope “global”: chunks of the whole query are shuffled and dealt to ranks anew in every epoch. Its workers share the mini-batches of a rank, which do not depend on their number.",
};

function key(step: Step, group: number): string {
  return `${step.rank[group]} ${step.worker[group]}`;
}

function count(step: Step): Map<string, { groups: number; rows: number }> {
  const counts = new Map<string, { groups: number; rows: number }>();
  step.rank.forEach((rank, group) => {
    if (rank === NOBODY) return;
    const found = counts.get(key(step, group)) ?? { groups: 0, rows: 0 };
    counts.set(key(step, group), { groups: found.groups + 1, rows: found.rows + step.starts[group + 1] - step.starts[group] });
  });
  return counts;
}
