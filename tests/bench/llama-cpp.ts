import { execFileSync, type StdioOptions } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { cpus } from 'node:os';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import type { BenchReport } from '../../server/bench/step.js';
import { usableCores } from '../../server/machine.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { readSyntheticModel } from '../../server/model/synthetic.js';
import { greedyIds } from './llama-cpp-greedy.js';
import { writeDeepseek2 } from './deepseek2-gguf.js';
import { CheckpointSource, RandomSource } from './tensor-source.js';

const HELP = `Times llama.cpp beside Rodin: the same model, the same threads, run in turns. Prints one table.

  node --import tsx tests/bench/llama-cpp.ts [flags]

  --models LIST   pocket-r1, moonlight: 4 layers of Moonlight's shape, random weights (pocket-r1,moonlight)
  --types LIST    weights of llama.cpp: q8_0, bf16 (q8_0,bf16)
  --threads N     compute threads of both (one per core)
  --rounds N      runs of each (3)
  --folder DIR    where llama.cpp and the GGUF files go; may be deleted afterwards (tests/bench/.llama-cpp)

The first run installs node-llama-cpp there, which brings llama.cpp's source, and builds that: several minutes.
Needs npm's registry, git and CMake. Rodin must be built (npm start does that).
`;

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const NODE_LLAMA_CPP = '3.22.1';
const BATCHES = [1, 16];
const CONTEXT = 1024;
const PROMPT = 512;
const NUM_GREEDY = 12;
const MAX_ATTEMPTS = 10;

interface Model {
  name: string;
  /** what `rodin bench step` is given */
  flags: string[];
  /** how Rodin is run, each with flags of its own */
  variants: { name: string; flags: string[] }[];
  /** decode steps of llama.cpp; Rodin counts time */
  numSteps: number;
  write(file: string, type: 'BF16' | 'Q8_0'): void;
}

interface Figures {
  /** tokens/s of one sequence, of 16, of a prompt */
  single: number;
  batch: number;
  prefill: number;
}

const { values } = parseArgs({
  options: {
    models: { type: 'string', default: 'pocket-r1,moonlight' },
    types: { type: 'string', default: 'q8_0,bf16' },
    threads: { type: 'string', default: String(usableCores()) },
    rounds: { type: 'string', default: '3' },
    folder: { type: 'string', default: join(ROOT, 'tests/bench/.llama-cpp') },
    help: { type: 'boolean', default: false },
  },
});

const POCKET_R1 = join(ROOT, 'models/pocket-r1');
const MOONLIGHT = join(ROOT, 'tests/bench/configs/moonlight-16b-a3b-fp8.json');
const hasFloatKvB = readFileSync('/proc/cpuinfo', 'utf8').includes('amx_tile');

const MODELS: Model[] = [
  {
    name: 'pocket-r1',
    flags: ['--model', POCKET_R1],
    variants: [{ name: 'Rodin', flags: [] }],
    numSteps: 256,
    write: (file, type) => {
      const checkpoint = readCheckpoint(POCKET_R1);
      const options = { type, hasFloatKvB, folder: POCKET_R1 };
      writeDeepseek2(file, checkpoint.spec, new CheckpointSource(checkpoint), options);
    },
  },
  {
    name: 'moonlight',
    flags: ['--model', MOONLIGHT, '--weights', 'synthetic', '--layers', '4'],
    // Q8_0 takes a byte for each of the head's weights too.
    variants: [
      { name: 'Rodin', flags: [] },
      { name: 'Rodin, --head-dtype fp8', flags: ['--head-dtype', 'fp8'] },
    ],
    numSteps: 16,
    write: (file, type) => {
      const { spec } = readSyntheticModel(MOONLIGHT, 4);
      writeDeepseek2(file, spec, new RandomSource(), { type, hasFloatKvB, folder: null });
    },
  },
];

if (values.help) process.stdout.write(HELP);
else await main();

async function main(): Promise<void> {
  const folder = resolve(values.folder);
  const threads = integer('threads');
  const rounds = integer('rounds');
  const models = chosen('models', MODELS, ({ name }) => name);
  const types = chosen('types', ['Q8_0', 'BF16'] as const, (type) => type.toLowerCase());
  mkdirSync(folder, { recursive: true });
  const bench = buildLlamaCpp(folder);
  const rows: string[] = [];
  for (const model of models) {
    const files = types.map((type) => ({ type, file: join(folder, `${model.name}-${type.toLowerCase()}.gguf`) }));
    for (const { type, file } of files) {
      if (!existsSync(file)) model.write(file, type);
      if (model.name === 'pocket-r1') await checkGreedy(folder, file, threads);
    }
    const ours = model.variants.map((): Figures[] => []);
    const peers = files.map((): Figures[] => []);
    for (let round = 0; round < rounds; round++) {
      for (const [index, { flags }] of model.variants.entries())
        ours[index]!.push(runRodin([...model.flags, ...flags], threads));
      for (const [index, { file }] of files.entries()) peers[index]!.push(runLlamaCpp(bench, file, model, threads));
    }
    for (const [index, { name }] of model.variants.entries())
      rows.push(row(index === 0 ? model.name : '', name, medians(ours[index]!)));
    for (const [index, { type }] of files.entries()) {
      rows.push(row('', `llama.cpp ${type}`, medians(peers[index]!), ours.map(medians)));
    }
  }
  const commit = execFileSync('git', ['-C', ROOT, 'rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
  const date = new Date().toISOString().slice(0, 10);
  process.stdout.write(`
${date}, ${cpus()[0]!.model.trim()}, ${threads} threads, commit ${commit}, node-llama-cpp ${NODE_LLAMA_CPP}'s llama.cpp, medians of ${rounds};
tokens/s, context ${CONTEXT}; in brackets: Rodin's figures divided by it.

| model | engine | 1 sequence | 16 sequences | prompt of ${PROMPT} |
|---|---|---|---|---|
${rows.join('\n')}
`);
}

/** Installs and builds what is not there yet. Returns the path of llama-batched-bench. */
function buildLlamaCpp(folder: string): string {
  const run = (command: string, ...args: string[]): void => {
    execFileSync(command, args, { cwd: folder, stdio: ['ignore', 'ignore', 'inherit'] });
  };
  const source = join(folder, 'llama.cpp');
  const bench = join(source, 'build/bin/llama-batched-bench');
  if (existsSync(bench)) return bench;
  const packages = [`node-llama-cpp@${NODE_LLAMA_CPP}`, `@node-llama-cpp/linux-x64@${NODE_LLAMA_CPP}`];
  // binaries of other devices are optional and large
  run('npm', 'install', '--prefix', folder, '--no-save', '--ignore-scripts', '--omit=optional', ...packages);
  rmSync(source, { recursive: true, force: true });
  run('git', 'clone', '--quiet', 'node_modules/node-llama-cpp/llama/gitRelease.bundle', source);
  const flags = [
    'LLAMA_OPENSSL',
    'LLAMA_USE_PREBUILT_UI',
    'LLAMA_BUILD_TESTS',
    'LLAMA_BUILD_SERVER',
    'BUILD_SHARED_LIBS',
  ];
  run(
    'cmake',
    '-S',
    source,
    '-B',
    join(source, 'build'),
    '-DCMAKE_BUILD_TYPE=Release',
    ...flags.map((flag) => `-D${flag}=OFF`),
  );
  run('cmake', '--build', join(source, 'build'), '-j', String(usableCores()), '--target', 'llama-batched-bench');
  return bench;
}

/** A conversion that is wrong would be compared in vain. Quantised weights answer differently now and then. */
async function checkGreedy(folder: string, file: string, threads: number): Promise<void> {
  const lines = readFileSync(join(ROOT, 'tests/fixtures/pocket-r1-reference/greedy.jsonl'), 'utf8').trim().split('\n');
  const cases = lines
    .slice(0, NUM_GREEDY)
    .map((line) => JSON.parse(line) as { prompt_ids: number[]; output_ids: number[] });
  let equal = 0;
  for (const { prompt_ids, output_ids } of cases) {
    // all but the end token, which does not come out
    const expected = output_ids.slice(0, -1);
    const ids = await greedyIds(folder, file, threads, prompt_ids, expected.length);
    if (ids.join() === expected.join()) equal++;
  }
  process.stdout.write(`${file}: ${equal} of ${cases.length} greedy answers are the model's own\n`);
  if (equal < cases.length / 2)
    throw new Error(`${file} is not the model: only ${equal} of ${cases.length} answers are right.`);
}

function runRodin(own: readonly string[], threads: number): Figures {
  const flags = [
    '--device',
    'cpu',
    '--threads',
    threads,
    '--batch',
    BATCHES.join(','),
    '--context',
    CONTEXT,
    '--prompt',
    PROMPT,
  ];
  const args = [join(ROOT, 'dist/main.js'), 'bench', 'step', ...own, ...flags.map(String), '--json'];
  const { cases } = JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })) as BenchReport;
  const rate = (kind: string, numSequences: number): number =>
    cases.find((one) => one.kind === kind && one.numSequences === numSequences)!.tokensPerSecond;
  return { single: rate('decode', BATCHES[0]!), batch: rate('decode', BATCHES[1]!), prefill: rate('prefill', 1) };
}

interface BatchedBenchLine {
  /** sequences at once */
  pl: number;
  speed_tg: number;
  speed_pp: number;
}

/** One process for the decode steps, whose sequences share one prompt so that filling the cache takes no time; one for the prompt. */
function runLlamaCpp(bench: string, file: string, model: Model, threads: number): Figures {
  const common = ['-m', file, '-t', threads, '-tb', threads, '-fa', 'on', '--output-format', 'jsonl'];
  const most = BATCHES[1]! * (CONTEXT + model.numSteps + 1);
  const decode = batchedBench(bench, BATCHES.length, [
    ...common,
    ...['-c', most, '-npp', CONTEXT, '-ntg', model.numSteps, '-npl', BATCHES.join(','), '-pps'],
  ]);
  const prefill = batchedBench(bench, 1, [
    ...common,
    ...['-c', PROMPT + 64, '-npp', PROMPT, '-ntg', 1, '-npl', 1, '-b', PROMPT, '-ub', PROMPT],
  ]);
  const of = (pl: number): number => decode.find((line) => line.pl === pl)!.speed_tg;
  return { single: of(BATCHES[0]!), batch: of(BATCHES[1]!), prefill: prefill[0]!.speed_pp };
}

/** Its log is written by a thread that the end of the process may cut off, then it is run again. */
function batchedBench(bench: string, numLines: number, args: (string | number)[]): BatchedBenchLine[] {
  for (let attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
    const stdio: StdioOptions = ['ignore', 'pipe', 'ignore'];
    const lines = execFileSync(bench, args.map(String), { encoding: 'utf8', stdio })
      .split('\n')
      .filter((line) => line.startsWith('{') && line.endsWith('}'))
      .map((line) => JSON.parse(line) as BatchedBenchLine);
    if (lines.length === numLines) return lines;
  }
  throw new Error(`${bench} ${args.join(' ')} printed nothing ${MAX_ATTEMPTS} times.`);
}

function medians(all: readonly Figures[]): Figures {
  const median = (key: keyof Figures): number => {
    const sorted = all.map((figures) => figures[key]).toSorted((a, b) => a - b);
    return sorted[Math.floor((sorted.length - 1) / 2)]!;
  };
  return { single: median('single'), batch: median('batch'), prefill: median('prefill') };
}

function row(model: string, engine: string, figures: Figures, ours: readonly Figures[] = []): string {
  const cells = (['single', 'batch', 'prefill'] as const).map((key) => {
    const figure = figures[key] < 100 ? figures[key].toFixed(1) : Math.round(figures[key]).toLocaleString('en');
    const ratios = ours.map((own) => (own[key] / figures[key]).toFixed(1));
    return ratios.length === 0 ? figure : `${figure} (${ratios.join(', ')})`;
  });
  return `| ${[model, engine, ...cells].join(' | ')} |`;
}

function integer(flag: 'threads' | 'rounds'): number {
  const number = Number(values[flag]);
  if (!Number.isInteger(number) || number < 1) throw new Error(`--${flag} must be a number from 1.`);
  return number;
}

function chosen<T>(flag: 'models' | 'types', all: readonly T[], nameOf: (item: T) => string): T[] {
  return values[flag].split(',').map((name) => {
    const found = all.find((item) => nameOf(item) === name);
    if (found === undefined) throw new Error(`--${flag} knows ${all.map(nameOf).join(' and ')}, not ${name}.`);
    return found;
  });
}
