import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { startHarness } from '../contract/harness.js';
import { runLoad } from './load.js';
import { quantilesOf, reportOf } from './report.js';
import type { Sample } from './request.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

function bench(...args: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> {
  const child = spawn(process.execPath, ['--import', 'tsx', 'tests/bench/serve.ts', ...args], {
    cwd: ROOT,
    env: { ...process.env, BENCH_KEY: 'secret' },
  });
  let [stdout, stderr] = ['', ''];
  child.stdout.on('data', (part: Buffer) => (stdout += part.toString()));
  child.stderr.on('data', (part: Buffer) => (stderr += part.toString()));
  return new Promise((resolve) => child.once('close', (code) => resolve({ code, stdout, stderr })));
}

test('closed and open loop against a server: every request and token is counted, and times are those of the stream', async () => {
  const harness = startHarness({ args: ['--api-key', 'secret'] });
  const tokens = harness.thought('Let me see.', 'It is 4.');
  const gapMs = 10;
  harness.engine.script = function* () {
    for (const [index, token] of tokens.entries()) {
      yield sleep(gapMs);
      const isLast = index === tokens.length - 1;
      yield { tokens: [token], cachedTokens: 1, ...(isLast ? { finishReason: 'stop' } : {}) };
    }
  };
  const url = ['--url', `${await harness.listen()}/v1`, '--api-key-env', 'BENCH_KEY', '--json'];
  for (const [loop, numRequests] of [
    [['--concurrency', '3', '--requests', '7'], 7],
    [['--rate', '50', '--requests', '5', '--input-words', '20'], 5],
  ] as const) {
    const before = harness.engine.requests.length;
    const { code, stdout, stderr } = await bench(...url, '--warmup', '1', ...loop);
    assert.equal(code, 0, stderr);
    const report = JSON.parse(stdout);
    assert.equal(harness.engine.requests.length - before, numRequests + 1);
    assert.deepEqual([report.requests, report.failed, report.skipped], [numRequests, 0, 0]);
    assert.deepEqual([report.completionTokens, report.cachedTokens], [numRequests * tokens.length, numRequests]);
    const { ttft, ttfa, itl, tpot, e2e } = report.latencies;
    assert.deepEqual([ttft.num, ttfa.num, tpot.num, e2e.num], Array(4).fill(numRequests));
    assert.ok(ttft.median >= gapMs - 1 && ttfa.median > ttft.median && e2e.median > ttfa.median);
    assert.ok(itl.median >= gapMs - 1 && tpot.median >= gapMs - 2, JSON.stringify(report));
    assert.ok(e2e.median >= tokens.length * (gapMs - 1) && e2e.p99 >= e2e.p90 && e2e.p90 >= e2e.median);
  }
  const refused = await bench('--url', url[1]!, '--model', 'pocket-r1', '--requests', '1');
  assert.equal(refused.code, 2);
  assert.match(refused.stderr, /status 401/);
  await harness.close();
});

test('--help says everything, and bad flags are one sentence', async () => {
  const { code, stdout } = await bench('--help');
  assert.equal(code, 0);
  for (const flag of ['--url', '--rate', '--concurrency', '--prompts', '--allow-remote'])
    assert.ok(stdout.includes(flag));
  for (const [args, words] of [
    [['--url', 'http://10.0.0.1/v1'], /--allow-remote/],
    [['--url', 'http://localhost.example.org/v1'], /--allow-remote/],
    [['--requests', '0'], /from 1 to 100000/],
    [['--rate', '1', '--concurrency', '1'], /one of them/],
    [['--nothing'], /Unknown option/],
  ] as const) {
    const result = await bench(...args, ...(args[0] === '--requests' ? ['--model', 'x', '--warmup', '0'] : []));
    assert.equal(result.code, 2, result.stdout);
    assert.match(result.stderr, words);
  }
});

const SAMPLE: Sample = {
  dueAt: 0,
  endedAt: 50,
  firstTokenAt: 10,
  firstAnswerAt: null,
  lastTokenAt: 40,
  gapsMs: [30],
  promptTokens: 5,
  cachedTokens: 0,
  completionTokens: 4,
  error: null,
};

test('failed requests are in no figure, and nothing measured is no number', () => {
  const failed = { ...SAMPLE, endedAt: 1e9, error: 'broken' };
  const report = reportOf({ samples: [SAMPLE, failed], numSkipped: 3, seconds: 2 });
  assert.deepEqual([report.failed, report.skipped, report.errors], [1, 3, { broken: 1 }]);
  assert.equal(report.outputTokensPerSecond, 2);
  assert.deepEqual(report.latencies.tpot, { median: 10, p90: 10, p99: 10, num: 1 });
  assert.equal(report.latencies.ttfa, null);
  const values = Array.from({ length: 100 }, (_, index) => 100 - index);
  assert.deepEqual(quantilesOf(values), { median: 50, p90: 90, p99: 99, num: 100 });
});

test('loads keep their limits: so many at once, skipped beyond, cut at the end', async () => {
  let [numOpen, most] = [0, 0];
  const slow = async (_index: number, _dueAt: number, signal: AbortSignal): Promise<Sample> => {
    most = Math.max(most, ++numOpen);
    await sleep(20, undefined, { signal }).catch(() => {});
    numOpen--;
    return { ...SAMPLE, error: signal.aborted ? 'cut' : null };
  };
  const closed = await runLoad(9, { kind: 'closed', concurrency: 3 }, 10_000, slow);
  assert.deepEqual([closed.samples.length, most], [9, 3]);
  most = 0;
  const open = await runLoad(40, { kind: 'open', perSecond: 2000, maxInFlight: 4 }, 10_000, slow);
  assert.ok(most <= 4 && open.numSkipped > 0);
  assert.equal(open.samples.length + open.numSkipped, 40);
  const cut = await runLoad(1000, { kind: 'closed', concurrency: 2 }, 50, slow);
  assert.ok(cut.samples.length < 20 && cut.samples.at(-1)!.error === 'cut');
});
