import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import type { DoctorConfig } from '../../server/config.js';
import { examine, report } from '../../server/doctor.js';
import type { NativeAddon } from '../../server/engine/addon.js';
import { findAddon, type LoadedAddon } from '../../server/engine/load-addon.js';
import { StartupError } from '../../server/errors.js';
import { usableCores } from '../../server/machine.js';

const MODEL = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));
const CONFIG: DoctorConfig = { model: MODEL, device: 'auto', threads: null };

const ADDON = {
  cpuPaths: () => ['avx2', 'portable'],
  devices: () => ({ usable: ['cpu'], unusable: [{ device: 'cuda:0', reason: 'there is no driver' }] }),
} as unknown as NativeAddon;

const find = (): LoadedAddon => ({ addon: ADDON, path: '/there/rodin.node' });

test('a machine that can serve', () => {
  const findings = examine(CONFIG, '1.2.3', find);
  const { text, code } = report(findings);
  assert.equal(code, 0, text);
  for (const words of [
    /rodin +1\.2\.3, Node/,
    /addon +\/there\/rodin\.node/,
    /avx2, portable; the first is used/,
    /not usable +cuda:0: there is no driver/,
    /device +cpu is used with --device auto/,
    /pocket-r1: 6 layers, 16\.\d MiB of weights, drafts tokens/,
    /Rodin can serve here/,
  ]) {
    assert.match(text, words);
  }
  assert.match(report(examine({ ...CONFIG, threads: 7 }, '1', find)).text, /threads +7, because --threads says so/);
});

test('whatever is wrong is said, all of it, and the exit code says so too', () => {
  const missing = (): LoadedAddon => findAddon(['/nowhere/rodin.node']);
  const { text, code } = report(examine({ ...CONFIG, model: '/nowhere' }, '1', missing));
  assert.equal(code, 1);
  assert.match(text, /^! addon +The native addon is missing .*npx rodin build/m);
  assert.match(text, /^! model +\/nowhere is no folder/m);
  assert.match(text, /2 things to put right/);
  const device = report(examine({ ...CONFIG, device: 'cuda:0' }, '1', find));
  assert.match(device.text, /^! device +--device cuda:0 cannot be used: there is no driver/m);
  assert.equal(device.code, 1);
});

test('an addon that does not load gives way to the next', () => {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-addon-'));
  try {
    const broken = join(folder, 'rodin.node');
    writeFileSync(broken, 'no shared object');
    const path = fileURLToPath(new URL('../../build/rodin.node', import.meta.url));
    assert.equal(findAddon([broken, path]).path, path);
    assert.throws(
      () => findAddon([broken, '/nowhere/rodin.node']),
      (error) =>
        error instanceof StartupError && error.message.includes(broken) && /npx rodin build/.test(error.message),
    );
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("threads are as many as the control group's share of time pays for", () => {
  const all = availableParallelism();
  const v2 = (text: string) => usableCores((path) => (path === '/sys/fs/cgroup/cpu.max' ? text : null));
  assert.equal(v2('max 100000\n'), all);
  assert.equal(v2('100000 100000\n'), 1);
  assert.equal(v2('50000 100000\n'), 1);
  assert.equal(v2(`${all * 1e5 + 99} 100000\n`), all);
  const v1 = (quota: string) =>
    usableCores((path) => (/quota/.test(path) ? quota : /period/.test(path) ? '1000' : null));
  assert.equal(v1('-1\n'), all);
  assert.equal(v1('1999\n'), 1);
  assert.equal(
    usableCores(() => null),
    all,
  );
});
