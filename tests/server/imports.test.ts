import assert from 'node:assert/strict';
import { readFileSync, readdirSync } from 'node:fs';
import { dirname, join, posix, relative } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

/** What each part may import of ours. A part is a file of the top folder or a folder; 'type:' allows types alone. */
const SERVER_RULES: Record<string, string[]> = {
  errors: [],
  'flag-values': [],
  flags: ['flag-values'],
  config: ['errors', 'flags'],
  log: [],
  progress: [],
  machine: [],
  model: ['errors'],
  text: ['errors', 'type:engine'],
  grammar: ['errors', 'text'],
  'kv-events': ['type:engine'],
  telemetry: [],
  metrics: ['errors', 'type:engine'],
  engine: ['errors', 'model', 'grammar', 'machine'],
  logits: ['errors', 'model', 'engine', 'config', 'machine'],
  bench: ['errors', 'model', 'engine', 'machine', 'type:config'],
  doctor: ['errors', 'model', 'engine', 'config', 'machine', 'progress'],
  api: ['errors', 'text', 'engine', 'grammar', 'metrics', 'config', 'type:model', 'type:telemetry'],
  app: ['errors', 'api', 'text', 'engine', 'metrics', 'config', 'type:model', 'type:telemetry'],
  server: [
    ...['errors', 'app', 'api', 'text', 'engine', 'config', 'model', 'log', 'machine', 'kv-events', 'telemetry'],
  ],
  serve: ['errors', 'server', 'config', 'type:engine', 'log', 'progress'],
  'local-chat': ['errors', 'type:api'],
  index: ['errors', 'server', 'config', 'local-chat'],
  main: ['errors', 'config', 'flags', 'serve', 'logits', 'bench', 'doctor', 'progress'],
};

const NATIVE_RULES: Record<string, string[]> = {
  comm: [],
  ops: ['comm'],
  model: ['ops', 'comm'],
  engine: ['model', 'ops', 'comm', 'backend'],
  node: ['engine', 'model', 'ops', 'comm', 'backend'],
  backend: ['ops', 'cuda'],
  cuda: ['ops', 'comm'],
};

function filesUnder(folder: string, pattern: RegExp): string[] {
  return readdirSync(join(ROOT, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && pattern.test(entry.name))
    .map((entry) => relative(ROOT, join(entry.parentPath, entry.name)));
}

/** First path component below the top folder, without extension: 'engine/loop.ts' and 'engine.ts' are both 'engine'. */
function partOf(path: string): string {
  return (path.split('/')[0] ?? '').replace(/\.(ts|js|h|cc)$/, '');
}

test('server imports point one way', () => {
  const sources = filesUnder('server', /\.ts$/).filter((path) => !path.endsWith('.d.ts'));
  assert.ok(sources.length > 10);
  const broken: string[] = [];
  for (const source of sources) {
    const from = partOf(relative('server', source));
    const allowed = SERVER_RULES[from];
    assert.ok(allowed, `${source}: no rule for '${from}'; add one to this test and to the design`);
    const text = readFileSync(join(ROOT, source), 'utf8');
    for (const match of text.matchAll(/^(?:import|export)\s+(type\s)?[^;]*?from\s+'(\.[^']+)'/gms)) {
      const to = partOf(relative('server', posix.join(dirname(source), match[2] ?? '')));
      const ok = to === from || allowed.includes(to) || (match[1] !== undefined && allowed.includes(`type:${to}`));
      if (!ok) broken.push(`${source} imports ${match[2]}`);
    }
  }
  assert.deepEqual(broken, []);
});

test('native includes point one way', () => {
  const addon = filesUnder('addon', /\.(h|cc)$/).map((path) => ({ path, part: partOf(relative('addon', path)) }));
  const cuda = filesUnder('cuda', /\.(h|cuh|cu|cc)$/).map((path) => ({ path, part: 'cuda' }));
  assert.ok(addon.length > 10);
  const broken: string[] = [];
  for (const { path, part } of [...addon, ...cuda]) {
    const allowed = NATIVE_RULES[part];
    assert.ok(allowed, `${path}: no rule for '${part}'; add one to this test and to the design`);
    const text = readFileSync(join(ROOT, path), 'utf8');
    for (const match of text.matchAll(/^\s*#include\s+"([^"]+)"/gm)) {
      const include = match[1] ?? '';
      const to = include.includes('/') ? partOf(include.replace(/^(\.\.\/)+/, '')) : part;
      if (to !== part && !allowed.includes(to)) broken.push(`${path} includes ${include}`);
    }
  }
  assert.deepEqual(broken, []);
});

test('only addon/node includes napi.h', () => {
  for (const path of filesUnder('addon', /\.(h|cc)$/)) {
    const includesNapi = /#include\s+[<"](napi|node_api)\.h[>"]/.test(readFileSync(join(ROOT, path), 'utf8'));
    if (includesNapi) assert.match(path, /^addon\/node\//);
  }
});

test('process.exit is called in server/main.ts alone', () => {
  for (const path of filesUnder('server', /\.ts$/)) {
    if (path === 'server/main.ts' || path === 'server/engine/child.ts') continue;
    assert.doesNotMatch(readFileSync(join(ROOT, path), 'utf8'), /\bprocess\.exit\(/, path);
  }
});
