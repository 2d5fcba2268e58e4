import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ApiError, StartupError, createEngine, createServer, type ServeOptions } from '../../server/index.js';

const OPTIONS: ServeOptions = { cacheMemory: '128MiB', maxNumSeqs: 8 };
const messages = [{ role: 'user' as const, content: 'What is 577 × 63?' }];

async function until(condition: () => boolean | Promise<boolean>, what: string): Promise<void> {
  const end = performance.now() + 10_000;
  while (!(await condition())) {
    assert.ok(performance.now() < end, `waited 10 s for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

test('an engine answers without a port: whole, in chunks, with errors, and can be left', async () => {
  const lines: any[] = [];
  const logStream = { write: (line: string) => void lines.push(JSON.parse(line)) };
  const engine = await createEngine({ ...OPTIONS, apiKey: ['secret'], logStream });
  try {
    const whole = await engine.chat({ messages, seed: 1 });
    assert.match(whole.choices[0]!.message.content!, /36351/);
    let [thought, answer] = ['', ''];
    for await (const { choices } of engine.stream({ messages, seed: 1 })) {
      thought += choices[0]?.delta.reasoning_content ?? '';
      answer += choices[0]?.delta.content ?? '';
    }
    assert.deepEqual(
      [thought, answer],
      [whole.choices[0]!.message.reasoning_content, whole.choices[0]!.message.content],
    );

    const isBad = (error: unknown): boolean => error instanceof ApiError && error.param === 'temperature';
    await assert.rejects(engine.chat({ messages, temperature: -1 }), isBad);
    await assert.rejects(async () => {
      for await (const chunk of engine.stream({ messages, temperature: -1 })) void chunk;
    }, isBad);
    await assert.rejects(engine.chat({ messages, model: 'another' }), { code: 'model_not_found' });

    const ended = (): string[] => lines.filter(({ msg }) => msg === 'completion').map((line) => line.finish_reason);
    assert.deepEqual(ended(), ['stop', 'stop']);
    for await (const chunk of engine.stream({ messages, ignore_eos: true, max_tokens: 2000 })) {
      if (chunk.choices[0]?.delta.reasoning_content) break;
    }
    await until(() => ended().length === 3, 'the stream that was left');
    const controller = new AbortController();
    const aborted = engine.chat({ messages, ignore_eos: true, max_tokens: 2000 }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 100);
    await assert.rejects(aborted, { name: 'AbortError' });
    await until(() => ended().length === 4, 'the answer that was aborted');
    assert.deepEqual(ended().slice(2), ['abort', 'abort']);
  } finally {
    await engine.close();
  }
});

test('a server listens, serves what is added to it, and closes when what runs has ended', async () => {
  const server = await createServer({ ...OPTIONS, port: 0, servedModelName: ['mine'] });
  let isClosed = false;
  try {
    server.app.get('/hello', async () => ({ hello: 'world' }));
    const url = await server.listen();
    await server.ready();
    assert.deepEqual(await (await fetch(`${url}/hello`)).json(), { hello: 'world' });
    const running = fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'mine', messages }),
    });
    const numRunning = async (): Promise<number> =>
      ((await (await fetch(`${url}/health`)).json()) as { num_running: number }).num_running;
    await until(async () => (await numRunning()) > 0, 'the request');
    const closing = server.close();
    isClosed = true;
    assert.match(await (await running).text(), /36351/);
    await closing;
    await assert.rejects(fetch(`${url}/health`));
  } finally {
    if (!isClosed) await server.close(0);
  }
});

test('options that cannot be used are refused, as flags are', async () => {
  const refuses = (options: object, words: RegExp): Promise<void> =>
    assert.rejects(createServer(options), (error) => error instanceof StartupError && words.test(error.message));
  await refuses({ port: 99999 }, /^port must be a whole number from 0 to 65535; it is '99999'/);
  await refuses({ maxSequences: 3 }, /no option 'maxSequences'; there are model, host, port/);
  await refuses({ model: '/nowhere' }, /\/nowhere is no folder/);
  await refuses({ port: [1, 2] }, /port is given 2 times/);
  await refuses({ apiKey: 'a', cacheMemory: 'much' }, /cacheMemory must be a size/);
  await assert.rejects(createEngine({ model: '/nowhere' }), StartupError);
  await assert.rejects(createEngine({ port: 1 } as object), /'port' is an option of createServer/);
});
