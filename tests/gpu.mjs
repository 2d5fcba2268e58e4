/** `npm run test:gpu`: the tests that a GPU changes something for, one file after another, on cuda:0. */
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const HERE = new URL('./', import.meta.url);
const FOLDERS = ['native', 'parity', 'e2e'];
const LEFT_OUT = {
  'e2e/clients.test.ts': 'published clients: the device changes nothing that they see',
  'e2e/messages.test.ts': 'the same',
  'e2e/responses.test.ts': 'the same',
  'e2e/operations.test.ts': 'cache events and operations of the server, without the device',
  'e2e/start.test.ts': 'npm, and the memory of a process that computes by itself',
  'e2e/readme.test.ts': 'documented commands, on any machine',
  'e2e/budget.test.ts': 'a benchmark of its own',
};

const files = FOLDERS.flatMap((folder) =>
  readdirSync(new URL(`${folder}/`, HERE))
    .filter((name) => name.endsWith('.test.ts'))
    .map((name) => `${folder}/${name}`),
);
for (const [name, reason] of Object.entries(LEFT_OUT)) {
  if (!files.includes(name)) throw new Error(`tests/gpu.mjs leaves out ${name}, which is not there`);
  console.log(`left out: ${name} (${reason})`);
}
const { status } = spawnSync(
  process.execPath,
  [
    ...['--import', 'tsx', '--test', '--test-concurrency=1'],
    ...files.filter((name) => !(name in LEFT_OUT)).map((name) => fileURLToPath(new URL(name, HERE))),
  ],
  { stdio: 'inherit', env: { ...process.env, RODIN_TEST_DEVICE: process.env.RODIN_TEST_DEVICE ?? 'cuda:0' } },
);
process.exit(status ?? 1);
