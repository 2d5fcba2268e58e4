#!/usr/bin/env node
// Makes a checkout runnable with Node alone: installs the packages, builds the addon and compiles the
// server, each only where it is missing or stale. Runs before `npm start` and `npm test`, and as `prepare`.
//
//   node server/setup.mjs [--no-install] [--tests | --addon | --prebuild]
//
// --no-install  leave node_modules as it is (npm itself is calling)
// --tests       also build the native test program
// --addon       build the addon and nothing else: what `rodin build` does in an installed package
// --prebuild    put the addon where a package carries it: prebuilds/<platform>-<arch>/rodin.node
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { delimiter, dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const args = new Set(process.argv.slice(2));
for (const arg of args) {
  if (!['--no-install', '--tests', '--addon', '--prebuild'].includes(arg)) fail(`unknown option ${arg}`);
}
process.chdir(root);

const COMPILER = 'node_modules/typescript/bin/tsc';
const DIST_STAMP = join('dist', '.rodin-stamp');

const MIN_NODE_MAJOR = 20;
if (Number(process.versions.node.split('.')[0]) < MIN_NODE_MAJOR) {
  fail(`Rodin needs Node ${MIN_NODE_MAJOR} or later; this is ${process.version}. Install a newer Node and try again.`);
}

if (!args.has('--no-install') && !args.has('--addon')) installPackages();
buildAddon();
if (!args.has('--addon')) compileServer();
if (args.has('--prebuild')) copyPrebuild();

function installPackages() {
  const stamp = join('node_modules', '.rodin-stamp');
  const wanted = digest(['package.json', 'package-lock.json']);
  if (isCurrent(stamp, wanted)) return;
  if (existsSync('node_modules') && packagesMatchLock()) return writeFileSync(stamp, wanted);
  say('installing packages (npm ci)');
  const npm = process.env.npm_execpath;
  // The compiler is a development package, which NODE_ENV=production would leave out.
  const flags = ['ci', '--include=dev', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'];
  if (npm?.endsWith('.js')) run(process.execPath, [npm, ...flags]);
  else run('npm', flags);
  writeFileSync(stamp, wanted);
}

/**
 * True where `npm ci` or `npm install` has already put every locked package of this platform in place. Development
 * packages may be missing, but for the compiler where there is something to compile.
 */
function packagesMatchLock() {
  if (!existsSync(COMPILER) && !isCurrent(DIST_STAMP, digest(serverSources()))) return false;
  const lock = JSON.parse(readFileSync('package-lock.json', 'utf8')).packages;
  return Object.entries(lock).every(([path, entry]) => {
    if (path === '' || entry.optional || entry.dev) return true;
    const manifest = join(path, 'package.json');
    return existsSync(manifest) && JSON.parse(readFileSync(manifest, 'utf8')).version === entry.version;
  });
}

function buildAddon() {
  const target = args.has('--tests') ? 'all' : 'rodin_addon';
  const stamp = join('build', `.rodin-stamp-${target}`);
  const sources = [...files('addon', /\.(h|cc|txt|cmake)$/), ...files('cuda', /\.(h|cuh|cu|cc)$/)];
  const wantedAddon = digest(sources);
  if (target === 'all') sources.push(...files('tests/native', /\.(h|cc|cu|txt)$/));
  const wanted = digest(sources);
  if (isCurrent(stamp, wanted) && existsSync('build/rodin.node')) return;

  const missing = [];
  if (!onPath('cmake')) missing.push('cmake');
  if (!process.env.CXX && !onPath('c++') && !onPath('g++') && !onPath('clang++')) missing.push('g++');
  if (!onPath('make') && !onPath('gmake')) missing.push('make');
  if (missing.length > 0) {
    const packages = missing.join(' ');
    fail(`the addon cannot be built: ${packages} not found on PATH. On Debian or Ubuntu: apt-get install ${packages}`);
  }
  say(`building the addon (cmake${target === 'all' ? ', with its tests' : ''})`);
  dropForeignCache();
  const problem = runCmake(target, 'AUTO');
  if (problem !== null && !usesCuda()) fail(`${problem}; what it printed is above.`);
  if (problem !== null) {
    // An nvcc that is too old, or that does not get on with this g++, must not keep anybody from the CPU.
    say('the CUDA kernels could not be built, see above; building for the CPU alone');
    const cpuProblem = runCmake(target, 'OFF');
    if (cpuProblem !== null) fail(`${cpuProblem}; what it printed is above.`);
  }
  writeFileSync(stamp, wanted);
  writeFileSync(join('build', '.rodin-stamp-rodin_addon'), wantedAddon);
}

/** Configures and builds; null, or what failed. */
function runCmake(target, cuda) {
  const configure = ['-S', 'addon', '-B', 'build', '-G', 'Unix Makefiles', '-DCMAKE_BUILD_TYPE=Release'];
  // In a package the headers may lie beside it, not below it; the tests are not there at all.
  configure.push(`-DNODE_API_INCLUDE=${join(folderOf('node-api-headers'), 'include')}`);
  configure.push(`-DNODE_ADDON_API_INCLUDE=${folderOf('node-addon-api')}`);
  configure.push(`-DRODIN_TESTS=${existsSync('tests/native') ? 'ON' : 'OFF'}`);
  const build = ['--build', 'build', '--target', target, '--parallel', String(availableParallelism())];
  return attempt('cmake', [...configure, `-DRODIN_CUDA=${cuda}`]) ?? attempt('cmake', build);
}

/** Folder of an installed package. */
function folderOf(name) {
  try {
    return dirname(createRequire(join(root, 'package.json')).resolve(`${name}/package.json`));
  } catch {
    return fail(`the package ${name} is not installed; run \`npm install\` first.`);
  }
}

function usesCuda() {
  return /^CMAKE_CUDA_COMPILER:\w+=(?!.*NOTFOUND)./m.test(readFileSync('build/CMakeCache.txt', 'utf8'));
}

/** A build folder that another generator or another place on disk made cannot be reused. */
function dropForeignCache() {
  if (!existsSync('build/CMakeCache.txt')) return;
  const cache = readFileSync('build/CMakeCache.txt', 'utf8');
  const generator = /^CMAKE_GENERATOR:INTERNAL=(.*)$/m.exec(cache)?.[1];
  const home = /^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$/m.exec(cache)?.[1];
  if (generator !== 'Unix Makefiles' || home !== join(root, 'addon')) rmSync('build', { recursive: true });
}

function serverSources() {
  return [...files('server', /\.ts$/), 'openapi/openapi.yaml', 'tsconfig.json', 'package-lock.json'];
}

function compileServer() {
  const wanted = digest(serverSources());
  if (isCurrent(DIST_STAMP, wanted)) return;
  if (!existsSync(COMPILER)) {
    if (!args.has('--no-install')) fail(`${COMPILER} is missing: run \`npm ci --include=dev\`.`);
    return say('the server is not compiled, because typescript is a development package; `npm start` installs it');
  }
  say('compiling the server (tsc)');
  const generator = 'node_modules/openapi-typescript/bin/cli.js'; // absent after an install without development packages
  if (existsSync(generator)) {
    run(process.execPath, [generator, 'openapi/openapi.yaml', '-o', 'server/api/openapi.d.ts', '--check']);
  }
  rmSync('dist', { recursive: true, force: true });
  run(process.execPath, [COMPILER, '-p', 'tsconfig.json']);
  // tsc leaves declarations where they are, and those of what it compiled import this one.
  copyFileSync('server/api/openapi.d.ts', 'dist/api/openapi.d.ts');
  writeFileSync(DIST_STAMP, wanted);
}

/** The addon as packages carry it: without symbols, which nobody can use there. */
function copyPrebuild() {
  const folder = join('prebuilds', `${process.platform}-${process.arch}`);
  say(`copying the addon to ${folder}`);
  mkdirSync(folder, { recursive: true });
  const path = join(folder, 'rodin.node');
  copyFileSync('build/rodin.node', path);
  run('strip', ['--strip-all', path]);
}

/** Files under `folder` whose name matches, sorted, so that the digest does not depend on the file system. */
function files(folder, pattern) {
  if (!existsSync(folder)) return [];
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && pattern.test(entry.name))
    .map((entry) => join(relative(root, join(root, entry.parentPath ?? entry.path)), entry.name))
    .sort();
}

function digest(paths) {
  const hash = createHash('sha256').update(`${process.platform} ${process.arch}\n`);
  for (const path of paths) hash.update(`${path}\n`).update(readFileSync(path));
  return hash.digest('hex');
}

function isCurrent(stamp, wanted) {
  return existsSync(stamp) && readFileSync(stamp, 'utf8') === wanted;
}

function onPath(tool) {
  return (process.env.PATH ?? '').split(delimiter).some((folder) => folder !== '' && existsSync(join(folder, tool)));
}

function run(command, commandArgs) {
  const problem = attempt(command, commandArgs);
  if (problem !== null) fail(`${problem}; what it printed is above.`);
}

/** Runs a command, keeping its output back unless it fails; null, or a sentence about the failure. */
function attempt(command, commandArgs) {
  const result = spawnSync(command, commandArgs, { stdio: ['ignore', 'pipe', 'pipe'], maxBuffer: 1 << 28 });
  if (result.error) fail(`${command} could not be started: ${result.error.message}`);
  if (result.status === 0) return null;
  process.stderr.write(Buffer.concat([result.stdout, result.stderr]));
  return `\`${[command, ...commandArgs].join(' ')}\` failed`;
}

function say(what) {
  process.stderr.write(`setup: ${what}\n`);
}

function fail(message) {
  process.stderr.write(`setup: ${message}\n`);
  process.exit(1);
}
