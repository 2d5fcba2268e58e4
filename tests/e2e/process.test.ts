import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import OpenAI from 'openai';
import { readEvents, rodin, Server } from './server.js';

const POCKET = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));
const QUESTION = [{ role: 'user' as const, content: 'What is 577 × 63?' }];
const LONG = { messages: QUESTION, ignore_eos: true, stream: true };

test('kill -9 of the engine: error events within a second, health says so, a new engine serves', async () => {
  const server = await Server.start();
  const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 });
  const firstPid = server.enginePid();
  let numStarted = 0;
  let killedAt = 0;
  const endedAfter: number[] = [];
  const raw = Array.from({ length: 4 }, async () => {
    let isFirst = true;
    const result = await readEvents(await server.chat(LONG), () => {
      if (isFirst) numStarted++;
      isFirst = false;
    });
    endedAfter.push(performance.now() - killedAt);
    return result;
  });
  const stream = await client.chat.completions.create({
    model: 'pocket-r1',
    messages: QUESTION,
    stream: true,
    max_tokens: 4000,
    ...{ ignore_eos: true },
  });
  const openai = (async () => {
    for await (const chunk of stream) assert.ok(chunk.id);
  })();
  openai.catch(() => {});
  const whole = server.chat({ ...LONG, stream: false });
  // Before the kill each of them has reached the engine, the whole answer's request too.
  while (numStarted < 4 || (await server.health()).num_running < 6) await sleep(5);
  killedAt = performance.now();
  process.kill(firstPid, 'SIGKILL');

  for (const { events, isDone } of await Promise.all(raw)) {
    assert.equal(isDone, false);
    const { error } = events.at(-1);
    assert.equal(error.code, 'engine_failed');
    assert.equal(error.type, 'server_error');
    assert.ok(events.slice(0, -1).every((event) => event.choices[0].finish_reason === null));
  }
  assert.ok(Math.max(...endedAfter) < 1000, `${Math.max(...endedAfter)} ms`);
  await assert.rejects(openai, (error) => error instanceof OpenAI.APIError);
  assert.equal((await whole).status, 500);

  const health = await fetch(`${server.url}/health`);
  const body = (await health.json()) as any;
  assert.deepEqual([health.status, body.status], [503, 'restarting']);
  assert.match(body.reason, /SIGKILL/);
  const refused = await server.chat({ messages: QUESTION });
  assert.equal(refused.status, 503);
  assert.equal(((await refused.json()) as any).error.code, 'engine_restarting');
  assert.equal(refused.headers.get('retry-after'), '1');

  while ((await server.health()).status !== 'ready') {
    assert.ok(performance.now() - killedAt < 10_000, 'no new engine within 10 s');
    await sleep(20);
  }
  assert.notEqual(server.enginePid(), firstPid);
  const answer = await server.json({ messages: QUESTION, temperature: 0 });
  assert.match(answer.choices[0].message.content, /36351/);
  assert.equal(await server.stop(), 0);
});

test('SIGTERM: running streams finish, new ones are refused, exit code 0, no process left', async () => {
  const server = await Server.start();
  const enginePid = server.enginePid();
  const stream = await server.chat({ ...LONG, max_tokens: 1500 });
  const reading = readEvents(stream);
  await sleep(50);
  server.signal('SIGTERM');
  await sleep(100);
  const health = await fetch(`${server.url}/health`);
  assert.equal(health.status, 503);
  assert.equal((await fetch(`${server.url}/health/live`)).status, 200);
  assert.equal((await server.chat({ messages: QUESTION })).status, 503);
  const { events, isDone } = await reading;
  assert.ok(isDone);
  assert.equal(events.at(-1).choices[0].finish_reason, 'length');
  assert.equal((await server.exit).code, 0);
  assert.throws(() => process.kill(enginePid, 0), /ESRCH/);
});

test('SIGINT with a short --shutdown-timeout: streams end with an error, exit code 0', async () => {
  const server = await Server.start('--shutdown-timeout', '0');
  const stream = await server.chat(LONG);
  const reading = readEvents(stream);
  await sleep(100);
  server.signal('SIGINT');
  const { events, isDone } = await reading;
  assert.equal(isDone, false);
  assert.equal(events.at(-1).error.code, 'shutting_down');
  assert.equal((await server.exit).code, 0);
});

test('a killed API process leaves no engine behind', async () => {
  const server = await Server.start();
  const enginePid = server.enginePid();
  server.signal('SIGKILL');
  await server.exit;
  for (let i = 0; ; i++) {
    try {
      process.kill(enginePid, 0);
    } catch {
      break;
    }
    assert.ok(i < 100, 'the engine lives on');
    await sleep(20);
  }
});

test('keys, names and formats of a running server', async () => {
  const server = await Server.start(
    '--api-key',
    'secret',
    '--served-model-name',
    'deepseek/r1',
    '--log-format',
    'text',
    '--log-level',
    'debug',
  );
  assert.equal((await server.chat({ messages: QUESTION })).status, 401);
  const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'secret', maxRetries: 0 });
  assert.equal((await client.models.retrieve('deepseek/r1')).id, 'deepseek/r1');
  const answer = await client.chat.completions.create({ model: 'deepseek/r1', messages: QUESTION, temperature: 0 });
  assert.equal(answer.model, 'deepseek/r1');
  assert.equal(await server.stop(), 0);
  assert.match(server.output.stdout, /Bearer KEY/);
  assert.match(server.output.stderr, /^\d\d:\d\d:\d\d info completion .*finish_reason=stop/m);
  assert.doesNotMatch(server.output.stdout + server.output.stderr, /secret/);
});

test('what stops the start is one sentence and exit code 1', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-'));
  const copy = (name: string): void => writeFileSync(join(folder, name), readFileSync(join(POCKET, name)));
  const refuses = async (args: string[], words: RegExp): Promise<void> => {
    const { code, stdout, stderr } = await rodin('serve', ...args);
    assert.deepEqual([code, stdout], [1, ''], stderr);
    const sentences = stderr.split('\n').filter((line) => line && !line.startsWith('{'));
    assert.equal(sentences.length, 1, stderr);
    assert.match(sentences[0]!, words);
  };
  try {
    await refuses(['--model', join(folder, 'none')], /^rodin: .*none is no folder/);
    await refuses(['--model', folder], /config\.json is missing/);
    for (const name of ['config.json', 'generation_config.json', 'tokenizer_config.json']) copy(name);
    await refuses(['--model', folder], /safetensors/);
    writeFileSync(join(folder, 'model.safetensors'), readFileSync(join(POCKET, 'model.safetensors')));
    await refuses(['--model', folder], /tokenizer\.json is missing/);
    copy('tokenizer.json');
    writeFileSync(
      join(folder, 'model.safetensors'),
      readFileSync(join(POCKET, 'model.safetensors')).subarray(0, 15_000_000),
    );
    await refuses(['--model', folder], /model\.safetensors/);
    await refuses(['--max-model-len', '9999'], /--max-model-len/);
    await refuses(['--port', 'x'], /--port must be/);
    const taken = createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => taken.once('listening', resolve));
    const { port } = taken.address() as { port: number };
    await refuses(['--port', String(port)], /Port \d+ on 127\.0\.0\.1 is in use; give another with --port\./);
    taken.close();
  } finally {
    rmSync(folder, { recursive: true });
  }
});
