export const PREWARM_DATA = new URL('prewarm.json', import.meta.url);

/** Second turns behind answers of one length, on a server without and one with --prewarm; medians. */
export interface PrewarmPoint {
  /** tokens of the first turn's answer, beside its reasoning */
  answer: number;
  /** prompt tokens of the second turn */
  prompt: number;
  without: PrewarmFigures;
  with: PrewarmFigures;
}

export interface PrewarmFigures {
  cachedTokens: number;
  ttftMs: number;
}

export interface PrewarmData {
  model: string;
  date: string;
  device: string;
  reasoning: number;
  rounds: number;
  points: PrewarmPoint[];
}

/** A Markdown table. */
export function tableOf({ points }: PrewarmData): string {
  const row = (name: string, cell: (point: PrewarmPoint) => string): string =>
    `| ${name} | ${points.map(cell).join(' | ')} |`;
  return [
    row('tokens of the answer', ({ answer }) => String(answer)),
    `|---${'|---'.repeat(points.length)}|`,
    row('prompt of the next turn', ({ prompt }) => String(prompt)),
    row('of it cached', ({ without }) => String(without.cachedTokens)),
    row('of it cached, `--prewarm`', (point) => String(point.with.cachedTokens)),
    row('TTFT', ({ without }) => `${without.ttftMs.toFixed(1)} ms`),
    row('TTFT, `--prewarm`', (point) => `${point.with.ttftMs.toFixed(1)} ms`),
  ].join('\n');
}
