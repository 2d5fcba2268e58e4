import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { FLAGS, type Flag } from '../../server/flags.js';
import { BUDGET_DATA, BUDGET_PLOT, plotOf, tableOf, type BudgetData } from '../bench/budget-plot.js';
import { PREWARM_DATA, tableOf as prewarmTableOf, type PrewarmData } from '../bench/prewarm-table.js';
import { tableOf as votesTableOf, VOTE_DATA, type VoteData, type VoteTask } from '../bench/vote-table.js';
import { Frames } from '../helpers/frames.js';
import { Reference, maxDifference } from '../helpers/reference.js';
import { Server, rodin } from './server.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const README = readFileSync(join(ROOT, 'README.md'), 'utf8');
const PACKAGE = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));

function row(flag: Flag): string {
  const name = flag.value === undefined ? `--${flag.name}` : `--${flag.name} ${flag.value}`;
  const fallback = flag.defaultText ?? (flag.default === null ? '' : String(flag.default));
  return `| \`${name}\` | ${fallback} | ${flag.help} |`;
}

test("README's table of flags is the program's", () => {
  const expected = FLAGS.filter((flag) => flag.commands.includes('serve')).map(row);
  const actual = README.split('\n').filter((line) => line.startsWith('| `--'));
  assert.deepEqual(actual, expected);
});

test("README's table of budgets and its picture are the measured ones; no budget was broken", () => {
  const data = JSON.parse(readFileSync(BUDGET_DATA, 'utf8')) as BudgetData;
  assert.ok(README.includes(`\n${tableOf(data)}\n`));
  assert.equal(readFileSync(BUDGET_PLOT, 'utf8'), plotOf(data));
  const numAnswers = data.points.reduce((sum, { total }) => sum + total, 0);
  assert.ok(README.includes(`In all ${numAnswers.toLocaleString('en')} answers`));
  assert.ok(data.points.every(({ broken, empty }) => broken === 0 && empty === 0));
});

test("README's table of votes is the measured one: more right than one chain, for less than all chains' tokens", () => {
  const data = JSON.parse(readFileSync(VOTE_DATA, 'utf8')) as VoteData;
  assert.ok(README.includes(`\n${votesTableOf(data)}\n`));
  const tasks = Object.values(data.tasks);
  const sum = (field: keyof VoteTask): number => tasks.reduce((total, task) => total + task[field], 0);
  assert.ok(sum('rightVotes') > sum('rightChains') / data.n);
  assert.ok(data.tokens.voting < data.tokens.alone);
});

test("README's table of prewarmed turns is the measured one", () => {
  const data = JSON.parse(readFileSync(PREWARM_DATA, 'utf8')) as PrewarmData;
  assert.ok(README.includes(`\n${prewarmTableOf(data)}\n`));
  assert.ok(
    README.includes(`${data.reasoning} tokens of reasoning`) && README.includes(`medians of ${data.rounds} of`),
  );
  for (const { without, with: warm, prompt } of data.points) {
    assert.ok(warm.cachedTokens > without.cachedTokens && prompt - warm.cachedTokens < 128);
  }
});

test("README's commands are the package's", () => {
  assert.match(README, /npm start +#/);
  assert.match(README, /npm test +#/);
  assert.equal(PACKAGE.scripts.start, 'node dist/main.js serve');
  assert.equal(PACKAGE.bin.rodin, 'dist/main.js');
});

test('--help of each command names each of its flags once', async () => {
  for (const command of ['serve', 'logits', 'bench'] as const) {
    const { code, stdout } = await rodin(command, '--help');
    assert.equal(code, 0);
    for (const { name, commands } of FLAGS) {
      const mentions = stdout.match(new RegExp(`^ +--${name}(?=[ \\n])`, 'gm'))?.length ?? 0;
      assert.equal(mentions, commands.includes(command) ? 1 : 0, `--${name} in ${command} --help`);
    }
  }
});

test("README's request is answered as README says", async () => {
  const body = /-d '(\{"model".*\})'/.exec(README)?.[1];
  assert.ok(body);
  const server = await Server.start();
  try {
    const response = await fetch(`${server.url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    });
    const { choices } = (await response.json()) as any;
    assert.match(choices[0].message.content, /36351/);
    assert.match(choices[0].message.reasoning_content, /36351/);
  } finally {
    assert.equal(await server.stop(), 0);
  }
});

test("README's responses are made as README says, by HTTP and over a WebSocket", async () => {
  const section = README.slice(README.indexOf('## Responses and WebSockets'));
  const body = /-d '(\{.*\})'/.exec(section)?.[1];
  const frames = /<!-- frames -->\s+```json\n(.*?)\n```/s.exec(section)?.[1]?.split('\n');
  assert.ok(body);
  assert.equal(frames?.length, 4);
  const server = await Server.start();
  try {
    const response = await fetch(`${server.url}/v1/responses`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    });
    const { output, usage } = (await response.json()) as any;
    assert.deepEqual(
      output.map(({ type }: any) => type),
      ['reasoning', 'message'],
    );
    assert.match(output[1].content[0].text, /36351/);
    const control = frames.pop()!;
    let cut = Infinity;
    const whole = usage.output_tokens_details.reasoning_tokens;
    // Where this process gets no turn for so long, the reasoning is over before it can be ended.
    for (let attempt = 0; attempt < 10 && cut >= whole; attempt++) {
      const socket = await Frames.open(server.url);
      for (const frame of frames) socket.socket.send(frame);
      await socket.until(({ type, stream_id }) => type === 'response.created' && stream_id === 'one');
      socket.socket.send(control);
      assert.deepEqual((await socket.ended('warm')).output, []);
      const [one, two] = [await socket.ended('one'), await socket.ended('two')];
      assert.deepEqual([one.status, two.status], ['completed', 'completed']);
      cut = one.usage.output_tokens_details.reasoning_tokens;
      await socket.close();
    }
    assert.ok(cut < whole, `${cut} of ${whole} reasoning tokens`);
  } finally {
    assert.equal(await server.stop(), 0);
  }
});

test("README's logits command writes the expected logits", async () => {
  const command = /^node dist\/main\.js (logits .*)$/m.exec(README)?.[1];
  assert.ok(command);
  const folder = mkdtempSync(join(tmpdir(), 'rodin-'));
  try {
    const fixture = join(ROOT, 'tests/fixtures/v3-fp8-mtp');
    const reference = new Reference(fixture);
    const prompts = reference.prompts();
    const input = join(folder, 'in.jsonl');
    const output = join(folder, 'out.jsonl');
    writeFileSync(input, prompts.map((ids) => `${JSON.stringify({ ids })}\n`).join(''));
    const args = command.replace('DIR', fixture).replace('IN.jsonl', input).replace('OUT.jsonl', output).split(/ +/);
    const { code, stderr } = await rodin(...args);
    assert.equal(code, 0, stderr);
    const lines = readFileSync(output, 'utf8').trimEnd().split('\n');
    assert.equal(lines.length, prompts.length);
    for (const [index, line] of lines.entries()) {
      const { ids, logits, draft_logits: draftLogits } = JSON.parse(line);
      assert.deepEqual(ids, prompts[index]);
      assert.ok(maxDifference(logits, reference.rows(`logits.${index}`)) <= 5e-3);
      if (!reference.has(`draft_logits.${index}`)) assert.deepEqual(draftLogits, []);
      else assert.ok(maxDifference(draftLogits, reference.rows(`draft_logits.${index}`)) <= 5e-3);
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});
