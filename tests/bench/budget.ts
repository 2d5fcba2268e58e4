import { readFileSync, writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { modelAt } from './model-at.js';
import { BUDGET_DATA, BUDGET_PLOT, plotOf, type BudgetData, type BudgetPoint } from './budget-plot.js';

const HELP = `Measures how right a reasoning model is with how much thinking, greedily, and how often a budget is broken.

  node --import tsx tests/bench/budget.ts --url http://127.0.0.1:8000/v1 [flags]

  --url URL          base URL of a server on this machine (http://127.0.0.1:8000/v1)
  --questions FILE   JSON lines with "messages", "task" and "answer", a text that right answers contain
                     (tests/fixtures/pocket-r1-reference/eval.jsonl)
  --budgets LIST     most reasoning tokens: numbers, ranges and none (1-64,128,none)
  --concurrency N    requests at once (16)
  --write            writes tests/bench/budget.json and budget.svg
`;

interface Question {
  task: string;
  messages: object[];
  tools?: object[];
  answer: string;
}

const EVAL = new URL('../fixtures/pocket-r1-reference/eval.jsonl', import.meta.url);

const { values } = parseArgs({
  options: {
    url: { type: 'string', default: 'http://127.0.0.1:8000/v1' },
    questions: { type: 'string' },
    budgets: { type: 'string', default: '1-64,128,none' },
    concurrency: { type: 'string', default: '16' },
    write: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) process.stdout.write(HELP);
else {
  await main().catch((error: unknown) => {
    process.stderr.write(`${(error as Error).message}\n`);
    process.exitCode = 1;
  });
}

async function main(): Promise<void> {
  const base = values.url.replace(/\/$/, '');
  if (!/^http:\/\/(localhost|127(\.\d+){3}|\[::1\])(:|\/)/.test(base))
    throw new Error('--url must be on this machine.');
  const text = readFileSync(values.questions ?? EVAL, 'utf8');
  const questions = text.trim().split('\n').map((line) => JSON.parse(line) as Question); // prettier-ignore
  const model = await modelAt(base);
  const points: BudgetPoint[] = [];
  for (const budget of budgetsOf(values.budgets)) {
    const point = await measure(base, model, questions, budget);
    points.push(point);
    const { right, total, broken, empty, reasoning } = point;
    const figures = `${right} of ${total} right, ${(reasoning / total).toFixed(1)} reasoning tokens each`;
    process.stdout.write(`budget ${budget ?? 'none'}: ${figures}, ${broken} over it, ${empty} empty\n`);
  }
  if (!values.write) return;
  const data: BudgetData = { model, date: new Date().toISOString().slice(0, 10), points };
  writeFileSync(BUDGET_DATA, `{"model": "${data.model}", "date": "${data.date}", "points": [\n${points.map((point) => `  ${JSON.stringify(point)}`).join(',\n')}\n]}\n`); // prettier-ignore
  writeFileSync(BUDGET_PLOT, plotOf(data));
}

function budgetsOf(list: string): (number | null)[] {
  return list.split(',').flatMap((part) => {
    const [, first, last] = /^(\d+)(?:-(\d+))?$/.exec(part) ?? [];
    if (part === 'none') return [null];
    if (first === undefined) throw new Error(`--budgets must be numbers, ranges and none; '${part}' is none of them.`);
    return Array.from({ length: Number(last ?? first) - Number(first) + 1 }, (_, index) => Number(first) + index);
  });
}

async function measure(
  base: string,
  model: string,
  questions: readonly Question[],
  budget: number | null,
): Promise<BudgetPoint> {
  const point: BudgetPoint = {
    budget,
    right: 0,
    total: questions.length,
    reasoning: 0,
    broken: 0,
    empty: 0,
    tasks: {},
  };
  const waiting = [...questions];
  const work = async (): Promise<void> => {
    for (let question = waiting.shift(); question; question = waiting.shift()) {
      const { task, messages, tools, answer } = question;
      const response = await fetch(`${base}/chat/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ model, messages, tools, temperature: 0, thinking_token_budget: budget ?? -1 }),
      });
      if (!response.ok) throw new Error(`status ${response.status}: ${await response.text()}`);
      const { choices, usage } = (await response.json()) as any;
      const { content, tool_calls: calls = [] } = choices[0].message;
      const said = [content ?? '', ...calls.map((call: any) => call.function.arguments)].join('\n');
      const numReasoning = usage.completion_tokens_details.reasoning_tokens as number;
      const isRight = said.includes(answer);
      const counts = (point.tasks[task] ??= [0, 0]);
      counts[0] += Number(isRight);
      counts[1] += 1;
      point.right += Number(isRight);
      point.reasoning += numReasoning;
      point.broken += Number(budget !== null && numReasoning > budget);
      point.empty += Number(said.trim() === '');
    }
  };
  await Promise.all(Array.from({ length: Number(values.concurrency) }, work));
  point.tasks = Object.fromEntries(Object.entries(point.tasks).sort(([a], [b]) => (a < b ? -1 : 1)));
  return point;
}
