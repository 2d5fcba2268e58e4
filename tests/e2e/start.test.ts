import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { LargeCheckpoint } from '../helpers/large-checkpoint.js';
import { CACHE_MEMORY_MIB, Server } from './server.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const MIB = 2 ** 20;

/** Runs `npm start` until the server says that it is ready; milliseconds, and what was printed. */
async function timeStart(): Promise<{ ms: number; output: string }> {
  const begin = performance.now();
  const child = spawn('npm', ['start', '--', '--port', '0'], { cwd: ROOT, detached: true });
  try {
    let output = '';
    const isReady = new Promise<void>((resolve, reject) => {
      const read = (part: Buffer): void => {
        output += part.toString();
        if (/Try:\n/.test(output)) resolve();
      };
      child.stdout.on('data', read);
      child.stderr.on('data', read);
      child.once('close', (code) => reject(new Error(`npm start ended with code ${code}:\n${output}`)));
    });
    await isReady;
    return { ms: performance.now() - begin, output };
  } finally {
    const isClosed = new Promise((resolve) => child.once('close', resolve));
    process.kill(-child.pid!, 'SIGTERM');
    await isClosed;
  }
}

test('npm start with nothing to build: ready in under 3 s', async (context) => {
  const starts = [await timeStart(), await timeStart(), await timeStart()];
  context.diagnostic(starts.map(({ ms }) => `${ms.toFixed(0)} ms`).join(', '));
  const fastest = starts.sort((a, b) => a.ms - b.ms)[0]!; // other programs on the machine only add
  assert.doesNotMatch(fastest.output, /setup: (building|installing|compiling)/);
  assert.match(fastest.output, /curl http:\/\/127\.0\.0\.1:\d+\/v1\/chat\/completions/);
  assert.ok(fastest.ms < 3000, `${fastest.ms} ms`);
});

function residentBytes(pid: number): number {
  const kilobytes = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  assert.ok(kilobytes);
  return Number(kilobytes) * 1024;
}

test('resident memory of both processes: at most weights + cache + 25 %', async (context) => {
  const checkpoint = new LargeCheckpoint(9);
  try {
    const server = await Server.start('--model', checkpoint.folder, '--served-model-name', 'large');
    try {
      const body = { model: 'large', messages: [{ role: 'user', content: 'Hi' }], max_tokens: 8, ignore_eos: true };
      assert.equal((await server.json(body)).usage.completion_tokens, 8);
      const resident = residentBytes(server.pid) + residentBytes(server.enginePid());
      const allowed = 1.25 * (checkpoint.weightBytes + CACHE_MEMORY_MIB * MIB);
      const inMiB = [resident, checkpoint.weightBytes, allowed].map((bytes) => (bytes / MIB).toFixed(0));
      context.diagnostic(`${inMiB[0]} MiB resident, ${inMiB[1]} MiB of weights, ${inMiB[2]} MiB allowed`);
      assert.ok(resident > checkpoint.weightBytes, 'every weight has been read');
      assert.ok(resident <= allowed);
    } finally {
      assert.equal(await server.stop(), 0);
    }
  } finally {
    checkpoint.close();
  }
});
