export const BUDGET_DATA = new URL('budget.json', import.meta.url);
export const BUDGET_PLOT = new URL('budget.svg', import.meta.url);

/** What one budget came to. */
export interface BudgetPoint {
  /** null: none */
  budget: number | null;
  right: number;
  total: number;
  /** reasoning tokens of all answers */
  reasoning: number;
  /** answers with more reasoning than the budget */
  broken: number;
  /** answers without content and calls */
  empty: number;
  /** [right, total] by kind of question */
  tasks: Record<string, [right: number, total: number]>;
}

export interface BudgetData {
  model: string;
  date: string;
  points: BudgetPoint[];
}

/** Budgets of the README's table. */
const SHOWN = [1, 2, 4, 8, 16, 24, 32, 48, 64, 128, null];
const LINES: [label: string, task: string | null, colour: string][] = [
  ['subway', 'subway', '#c2410c'],
  ['arithmetic', 'arith', '#1d4ed8'],
  ['all', null, '#111827'],
];
const [LEFT, TOP, WIDTH, HEIGHT] = [52, 34, 560, 250];

/** A Markdown table. */
export function tableOf({ points }: BudgetData): string {
  const shown = points.filter(({ budget }) => SHOWN.includes(budget));
  const row = (name: string, cells: string[]) => `| ${[name, ...cells].join(' | ')} |`;
  const of = (task: string) => shown.map(({ tasks }) => percent(tasks[task]![0] / tasks[task]![1]));
  return [
    row('thinking budget', shown.map(({ budget }) => String(budget ?? 'none'))), // prettier-ignore
    `|---${'|---'.repeat(shown.length)}|`,
    row('right, all', shown.map(({ right, total }) => percent(right / total))), // prettier-ignore
    row('arithmetic', of('arith')),
    row('subway', of('subway')),
    row('reasoning tokens', shown.map(({ reasoning, total }) => String(Math.round(reasoning / total)))), // prettier-ignore
  ].join('\n');
}

/** A picture of accuracy against budget; the axis of budgets is logarithmic, and none stands at its end. */
export function plotOf({ model, date, points }: BudgetData): string {
  const last = 2 * Math.max(...points.map(({ budget }) => budget ?? 1));
  const x = (budget: number | null) => LEFT + (WIDTH * Math.log2(budget ?? last)) / Math.log2(last);
  const y = (share: number) => TOP + HEIGHT * (1 - share);
  const shareOf = ({ right, total, tasks }: BudgetPoint, task: string | null) =>
    task === null ? right / total : tasks[task]![0] / tasks[task]![1];
  const at = (value: number) => value.toFixed(1);
  const lines = LINES.map(([label, task, colour], index) => {
    const path = points.map((point) => `${at(x(point.budget))},${at(y(shareOf(point, task)))}`).join(' ');
    return [
      `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="${task === null ? 2.5 : 1.5}"/>`,
      `<text x="${LEFT + WIDTH + 8}" y="${TOP + 4 + 18 * index}" fill="${colour}">${label}</text>`,
    ].join('\n');
  });
  const grid = [0, 0.25, 0.5, 0.75, 1].map(
    (share) =>
      `<line x1="${LEFT}" x2="${LEFT + WIDTH}" y1="${at(y(share))}" y2="${at(y(share))}" stroke="#d1d5db"/>` +
      `<text x="${LEFT - 8}" y="${at(y(share) + 4)}" text-anchor="end">${percent(share)}</text>`,
  );
  const ticks = [...SHOWN.filter((budget) => budget !== 24 && budget !== 48)].map(
    (budget) => `<text x="${at(x(budget))}" y="${TOP + HEIGHT + 18}" text-anchor="middle">${budget ?? 'none'}</text>`,
  );
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="700" height="340" viewBox="0 0 700 340" font-family="sans-serif" font-size="12" fill="#374151">`,
    '<rect width="700" height="340" fill="#ffffff"/>',
    `<text x="${LEFT}" y="20" font-size="14" fill="#111827">Right answers against thinking budget: ${model}, ${points[0]!.total} questions, greedy, ${date}</text>`,
    ...grid,
    ...ticks,
    `<text x="${LEFT + WIDTH / 2}" y="${TOP + HEIGHT + 40}" text-anchor="middle">most reasoning tokens</text>`,
    ...lines,
    '</svg>',
    '',
  ].join('\n');
}

function percent(share: number): string {
  return `${Math.round(100 * share)} %`;
}
