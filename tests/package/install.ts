/**
 * Packs this project and installs the archive into an empty folder, from the package registry, as its users do:
 *
 *   npm run test:package
 *
 * Then it runs the command, and builds the addon from source where the one in the package is taken away.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { inFolder, npm, pack, run } from './pack.js';

function say(text: string): void {
  process.stdout.write(`package: ${text}\n`);
}

/** PATH without compilers of CUDA: kernels take ten minutes and show nothing more here. */
const PATH = (process.env.PATH ?? '')
  .split(delimiter)
  .filter((folder) => !existsSync(join(folder, 'nvcc')))
  .join(delimiter);

async function serves(folder: string): Promise<void> {
  // A group of its own, because npx keeps signals to itself.
  const server = spawn('npx', ['rodin', 'serve', '--port', '0'], {
    cwd: folder,
    stdio: ['ignore', 'pipe', 'inherit'],
    detached: true,
  });
  const exit = new Promise<number | null>((resolve) => server.once('close', resolve));
  let output = '';
  server.stdout.on('data', (part: Buffer) => (output += part.toString()));
  try {
    const end = performance.now() + 60_000;
    let url: string | undefined;
    while (!(url = /Rodin serves pocket-r1 on (http:\S+)[\s\S]*Try:/.exec(output)?.[1])) {
      assert.ok(performance.now() < end && server.exitCode === null, `the server did not start:\n${output}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    const response = await fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'pocket-r1', messages: [{ role: 'user', content: 'What is 577 × 63?' }] }),
    });
    assert.match(await response.text(), /36351/);
  } finally {
    process.kill(-server.pid!, 'SIGTERM');
    await exit;
  }
}

await inFolder(async (folder) => {
  const { archive } = pack(join(folder, 'archive'));
  say(`the archive has ${(statSync(archive).size / 1e6).toFixed(1)} MB`);
  writeFileSync(join(folder, 'package.json'), '{ "private": true }');
  const installed = npm(folder, 'install', archive);
  assert.equal(installed.status, 0, installed.stderr);
  assert.doesNotMatch(installed.stderr, /rodin@\S+ \((pre|post)?install:/, 'no script has to be approved');
  const rodin = join(folder, 'node_modules/rodin');
  assert.ok(!existsSync(join(rodin, 'build')), 'nothing was compiled');
  const size = run(folder, 'du', ['-sm', 'node_modules']).stdout.split('\t')[0];
  say(`installed without a compiler: ${size} MB`);

  assert.match(run(folder, 'npx', ['rodin', '--version']).stdout, /^rodin \d/);
  await serves(folder);
  say('npx rodin serve answers');

  rmSync(join(rodin, 'prebuilds'), { recursive: true });
  const before = run(folder, 'npx', ['rodin', 'doctor']);
  assert.equal(before.status, 1);
  assert.match(before.stdout, /! addon .*npx rodin build/);
  const built = run(folder, 'npx', ['rodin', 'build'], { ...process.env, PATH });
  assert.equal(built.status, 0, built.stderr);
  const after = run(folder, 'npx', ['rodin', 'doctor']);
  assert.equal(after.status, 0, after.stdout);
  assert.match(after.stdout, /addon +\S+\/rodin\/build\/rodin\.node/);
  await serves(folder);
  say('without a prebuilt addon, npx rodin build makes one that answers');
  say('done');
});
