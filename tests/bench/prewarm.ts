import { writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { modelAt } from './model-at.js';
import { PREWARM_DATA, tableOf, type PrewarmData, type PrewarmFigures, type PrewarmPoint } from './prewarm-table.js';

const HELP = `Measures the time to the first token of second turns, behind a long thought, on two servers by turns.

  node --import tsx tests/bench/prewarm.ts --without URL --with URL [flags]

  --without URL      base URL of a server on this machine (http://127.0.0.1:8000/v1)
  --with URL         of one with --prewarm (http://127.0.0.1:8001/v1)
  --answers LIST     tokens of the first turn's answer (32,256,1024)
  --reasoning N      tokens of its reasoning (300)
  --rounds N         second turns of each kind (15)
  --pause MS         between the turns (2000)
  --write            writes tests/bench/prewarm.json
`;

const { values } = parseArgs({
  options: {
    without: { type: 'string', default: 'http://127.0.0.1:8000/v1' },
    with: { type: 'string', default: 'http://127.0.0.1:8001/v1' },
    answers: { type: 'string', default: '32,256,1024' },
    reasoning: { type: 'string', default: '300' },
    rounds: { type: 'string', default: '15' },
    pause: { type: 'string', default: '2000' },
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

interface Turn {
  content: string;
  promptTokens: number;
  cachedTokens: number;
  ttftMs: number;
}

async function main(): Promise<void> {
  const bases = [values.without, values.with].map((url) => url.replace(/\/$/, ''));
  for (const base of bases) {
    if (!/^http:\/\/(localhost|127(\.\d+){3}|\[::1\])(:|\/)/.test(base))
      throw new Error('--without and --with must be on this machine.');
  }
  const rounds = Number(values.rounds);
  const model = await modelAt(bases[0]!);
  await modelAt(bases[1]!);
  const { device } = (await (await fetch(`${bases[0]!.replace(/\/v1$/, '')}/health`)).json()) as { device: string };
  const points: PrewarmPoint[] = [];
  for (const answer of values.answers.split(',').map(Number)) {
    const turns: [Turn[], Turn[]] = [[], []];
    // The first rounds warm both up.
    for (let round = -2; round < rounds; round++) {
      for (const side of [0, 1] as const) {
        const turn = await secondTurn(bases[side]!, model, answer, `${answer}.${round}`);
        if (round >= 0) turns[side].push(turn);
      }
    }
    const [without, warm] = turns.map(figuresOf) as [PrewarmFigures, PrewarmFigures];
    points.push({ answer, prompt: median(turns[0].map(({ promptTokens }) => promptTokens)), without, with: warm });
  }
  const date = new Date().toISOString().slice(0, 10);
  const data: PrewarmData = { model, date, device, reasoning: Number(values.reasoning), rounds, points };
  process.stdout.write(`${tableOf(data)}\n`);
  if (values.write) writeFileSync(PREWARM_DATA, `${JSON.stringify(data, null, 2)}\n`);
}

/** Thinks and answers for so many tokens, pauses, and asks again; texts are the model's own, however far they go. */
async function secondTurn(base: string, model: string, answer: number, name: string): Promise<Turn> {
  const reasoning = Number(values.reasoning);
  const messages: object[] = [
    { role: 'system', content: `Conversation ${name}.` },
    { role: 'user', content: 'What is 577 × 63?' },
  ];
  const first = await turnOf(base, {
    model,
    messages,
    thinking_budget: reasoning,
    thinking_loop_tokens: 0,
    min_answer_tokens: answer,
    max_tokens: reasoning + answer,
    ignore_eos: true,
    logit_bias: await banned(base),
    seed: 1,
  });
  await sleep(Number(values.pause));
  messages.push({ role: 'assistant', content: first.content }, { role: 'user', content: 'And 23 + 948?' });
  return turnOf(base, { model, messages, thinking_budget: 40, max_tokens: 60, temperature: 0 });
}

/** Behind the end of its answer the model may think or call again, which is no answer as clients know it. */
async function banned(base: string): Promise<Record<string, number>> {
  const response = await fetch(`${base.replace(/\/v1$/, '')}/tokenize`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: '<think><｜tool▁calls▁begin｜>', add_special_tokens: false }),
  });
  const { tokens } = (await response.json()) as { tokens: number[] };
  return Object.fromEntries(tokens.map((id) => [String(id), -100]));
}

async function turnOf(base: string, body: object): Promise<Turn> {
  const startedAt = performance.now();
  const response = await fetch(`${base}/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw new Error(`status ${response.status}: ${await response.text()}`);
  const turn: Turn = { content: '', promptTokens: 0, cachedTokens: 0, ttftMs: 0 };
  let text = '';
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    text += part;
    const blocks = text.split('\n\n');
    text = blocks.pop()!;
    for (const block of blocks) {
      const data = /^data: (\{.*\})$/m.exec(block)?.[1];
      if (data === undefined) continue;
      if (turn.ttftMs === 0) turn.ttftMs = performance.now() - startedAt;
      const { choices, usage, error } = JSON.parse(data);
      if (error) throw new Error(error.message);
      turn.content += choices[0]?.delta.content ?? '';
      turn.promptTokens = usage?.prompt_tokens ?? turn.promptTokens;
      turn.cachedTokens = usage?.prompt_tokens_details.cached_tokens ?? turn.cachedTokens;
    }
  }
  return turn;
}

function figuresOf(turns: readonly Turn[]): PrewarmFigures {
  return {
    cachedTokens: median(turns.map(({ cachedTokens }) => cachedTokens)),
    ttftMs: Number(median(turns.map(({ ttftMs }) => ttftMs)).toFixed(2)),
  };
}

function median(list: readonly number[]): number {
  return list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)]!;
}
