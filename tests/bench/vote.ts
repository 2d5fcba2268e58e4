import { readFileSync, writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { modelAt } from './model-at.js';
import { tableOf, VOTE_DATA, type VoteData, type VoteTask } from './vote-table.js';

const HELP = `Measures how right the votes of several chains are beside each chain alone, and what stopping early saves.

  node --import tsx tests/bench/vote.ts --url http://127.0.0.1:8000/v1 [flags]

  --url URL          base URL of a server on this machine (http://127.0.0.1:8000/v1)
  --questions FILE   JSON lines with "messages", "task" and "answer", a text that right answers contain
                     (tests/fixtures/pocket-r1-reference/eval.jsonl)
  --n N              chains (5)
  --temperature T    of every chain (1)
  --concurrency N    requests at once (4)
  --write            writes tests/bench/vote.json
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
    n: { type: 'string', default: '5' },
    temperature: { type: 'string', default: '1' },
    concurrency: { type: 'string', default: '4' },
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
  const n = Number(values.n);
  const temperature = Number(values.temperature);
  const tasks: Record<string, VoteTask> = {};
  const tokens = { alone: 0, voting: 0 };
  const numbered = questions.map((question, index) => ({ ...question, seed: 1000 * index }));
  const work = async (): Promise<void> => {
    for (let question = numbered.shift(); question; question = numbered.shift()) {
      const { task, messages, tools, answer, seed } = question;
      // The same seeds, so that the chains are the same ones.
      const body = { model, messages, tools, temperature, n, seed };
      const alone = await ask(base, body);
      const voted = await ask(base, { ...body, vote: true });
      const counts = (tasks[task] ??= { questions: 0, rightChains: 0, rightVotes: 0 });
      counts.questions++;
      counts.rightChains += alone.choices.filter((choice: any) => said(choice).includes(answer)).length;
      counts.rightVotes += Number(said(voted.choices[0]).includes(answer));
      tokens.alone += alone.usage.completion_tokens;
      tokens.voting += voted.usage.completion_tokens;
    }
  };
  await Promise.all(Array.from({ length: Number(values.concurrency) }, work));
  const data: VoteData = {
    model,
    date: new Date().toISOString().slice(0, 10),
    temperature,
    n,
    tasks: Object.fromEntries(Object.entries(tasks).sort(([a], [b]) => (a < b ? -1 : 1))),
    tokens,
  };
  process.stdout.write(`${tableOf(data)}\n`);
  if (values.write) writeFileSync(VOTE_DATA, `${JSON.stringify(data, null, 2)}\n`);
}

function said({ message: { content, tool_calls: calls = [] } }: any): string {
  return [content ?? '', ...calls.map((call: any) => call.function.arguments)].join('\n');
}

async function ask(base: string, body: object): Promise<any> {
  const response = await fetch(`${base}/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`status ${response.status}: ${await response.text()}`);
  return response.json();
}
