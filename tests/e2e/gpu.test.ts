/** What only a GPU has: a context that fails, a cache that takes the rest of the memory, FP8 in it. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { EngineClient } from '../../server/engine/process.js';
import { makeRequest } from '../helpers/fake-runner.js';
import { IS_GPU, TEST_DEVICE } from '../helpers/device.js';
import { ENGINE_CONFIG } from '../helpers/speculation-workload.js';
import { rodin, Server } from './server.js';

const skip = IS_GPU ? false : 'RODIN_TEST_DEVICE names no GPU';
const ENTRY = fileURLToPath(new URL('../helpers/cuda-fault-child.ts', import.meta.url));
const QUESTION = [{ role: 'user' as const, content: 'What is 577 × 63?' }];

test(
  'a CUDA error ends the engine process; its streams end with an error and another one serves',
  { skip },
  async () => {
    const lines: string[] = [];
    const client = new EngineClient({ config: ENGINE_CONFIG, entry: ENTRY, log: (line) => lines.push(line) });
    try {
      await client.ready();
      const { pid } = client;
      const errors: string[] = [];
      let numTokens = 0;
      const streams = ['a', 'b', 'c'].map(async (id) => {
        for await (const event of client.submit(makeRequest(id, [0, 3, 5], { maxTokens: 2000 }))) {
          numTokens += event.tokens.length;
          if (event.error) errors.push(event.error.message);
        }
      });
      while (numTokens < 30) await sleep(5);
      process.kill(pid!, 'SIGUSR2');
      await Promise.all(streams);
      assert.equal(errors.length, 3);
      while (client.state().status !== 'ready' || client.pid === pid) await sleep(20);
      assert.match([...errors, ...lines].join('\n'), /CUDA: cudaErrorIllegalAddress/);
      let numAfter = 0;
      for await (const { tokens } of client.submit(makeRequest('after', [0, 3, 5], { maxTokens: 8 }))) {
        numAfter += tokens.length;
      }
      assert.equal(numAfter, 8);
    } finally {
      await client.close();
    }
  },
);

test(
  '--device auto takes the GPU and the cache what is left of its memory; an FP8 cache answers',
  { skip },
  async () => {
    const server = await Server.startWith('--gpu-memory-utilization', '0.5', '--kv-cache-dtype', 'fp8');
    try {
      assert.match((await server.health()).device, new RegExp(`^${TEST_DEVICE}`));
      assert.match(server.output.stdout, /\d\d\.\d GiB of cache/);
      const body = await server.json({ messages: QUESTION, temperature: 0 });
      assert.match(body.choices[0].message.content, /36351/);
    } finally {
      assert.equal(await server.stop(), 0);
    }
  },
);

test('what does not go together on a GPU, or fits into none, is one sentence', { skip }, async () => {
  const refuses = async (args: string[], words: RegExp): Promise<void> => {
    const { code, stderr } = await rodin('serve', '--port', '0', ...args);
    assert.equal(code, 1, stderr);
    assert.match(stderr, words);
  };
  await refuses(
    ['--device', TEST_DEVICE, '--gpu-memory-utilization', '0.00001'],
    /the GPU is out of memory: .* MiB .*--max-step-tokens/,
  );
  await refuses(['--device', TEST_DEVICE, '--cache-memory', '2TiB'], /the GPU is out of memory: \d+ MiB/);
  await refuses(
    ['--device', TEST_DEVICE, '--cache-memory', '1GiB', '--gpu-memory-utilization', '0.5'],
    /both size the latent cache/,
  );
  await refuses(['--device', 'cpu', '--kv-cache-dtype', 'fp8'], /needs a GPU/);
});
