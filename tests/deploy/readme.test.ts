import assert from 'node:assert/strict';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { readCommandLine } from '../../server/config.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const README = readFileSync(join(ROOT, 'README.md'), 'utf8');
const { scripts, version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));

/** Lines of shell in the README. */
const commands = [...README.matchAll(/```sh\n([\s\S]*?)```/g)]
  .flatMap(([, block]) => block!.split('\n'))
  .map((line) => line.replace(/ +#.*/, '').trim())
  .filter((line) => line !== '');

test("README's example is the one that is tested", () => {
  const [, code] = /```js\n([\s\S]*?)```/.exec(README)!;
  const lines = readFileSync(join(ROOT, 'examples/embed.mjs'), 'utf8').split('\n');
  assert.equal(code, lines.slice(1).join('\n'));
});

test("README's containers are those of the Dockerfile, with commands that Rodin takes", () => {
  const dockerfile = readFileSync(join(ROOT, 'Dockerfile'), 'utf8');
  const stages = [...dockerfile.matchAll(/^FROM (\S+)(?: AS (\S+))?$/gm)];
  assert.equal(stages.at(-1)![1], 'cpu', 'the default is the last');
  const docker = commands.filter((line) => line.startsWith('docker '));
  assert.ok(docker.length >= 5);
  for (const line of docker) {
    const target = /--target (\S+)/.exec(line)?.[1];
    if (target)
      assert.ok(
        stages.some(([, , name]) => name === target),
        line,
      );
    const args = / rodin(?::cuda)?(?: (.*))?$/.exec(line)?.[1]?.split(' ');
    if (line.startsWith('docker run') && args) assert.equal(readCommandLine(args, {}).kind, 'serve', line);
  }
  assert.match(dockerfile, new RegExp(`^ARG VERSION=${version.replaceAll('.', '\\.')}$`, 'm'));
});

test("README's other commands are there", () => {
  for (const [, name] of README.matchAll(/`npm run ([\w:]+)/g)) assert.ok(scripts[name!], `npm run ${name}`);
  for (const line of commands) {
    const [, archive] = /^npm install \.\/(\S+)$/.exec(line) ?? [];
    if (archive) assert.equal(archive, `rodin-${version}.tgz`);
    const [, command] = /^npx rodin (\w+)$/.exec(line) ?? [];
    if (command) assert.equal(readCommandLine([command], {}).kind, command);
    const [, overlay] = /^kubectl apply -k (\S+)$/.exec(line) ?? [];
    if (overlay) assert.ok(existsSync(join(ROOT, overlay, 'kustomization.yaml')), line);
  }
  const known = /^(npm (start|test|install)|npx rodin|node (dist\/main\.js|--import)|curl|-d |docker|kubectl apply -k)/;
  assert.deepEqual(
    commands.filter((line) => !known.test(line)),
    [],
  );
});

/** What was made here, or came from elsewhere. */
const FOREIGN = new Set(['node_modules', 'build', 'dist', 'prebuilds', '.git', 'fixtures']);

function readmesIn(folder: string): string[] {
  return readdirSync(join(ROOT, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return FOREIGN.has(entry.name) ? [] : readmesIn(path);
    return entry.name.endsWith('.md') ? [path] : [];
  });
}

test('every link of every README leads somewhere', () => {
  const files = readmesIn('');
  assert.ok(files.length > 15);
  const broken: string[] = [];
  for (const file of files) {
    for (const [, link] of readFileSync(join(ROOT, file), 'utf8').matchAll(/\]\(([^)#\s]+)(?:#[^)]*)?\)/g)) {
      if (!/^https?:/.test(link!) && !existsSync(join(ROOT, dirname(file), link!))) broken.push(`${file}: ${link}`);
    }
  }
  assert.deepEqual(broken, []);
});

test('every folder of the project says what is in it', () => {
  for (const folder of ['addon', 'cuda', 'deploy', 'examples', 'models', 'openapi', 'server', 'tests']) {
    assert.ok(existsSync(join(ROOT, folder, 'README.md')), folder);
  }
  for (const { name } of readdirSync(join(ROOT, 'server'), { withFileTypes: true }).filter((entry) =>
    entry.isDirectory(),
  )) {
    assert.ok(existsSync(join(ROOT, 'server', name, 'README.md')), name);
  }
});
