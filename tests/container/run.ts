/**
 * Builds the Dockerfile's targets with buildah and runs what came out, as root on Linux:
 *
 *   npm run test:container [-- --stand-ins] [--only cpu|cuda] [--storage FOLDER]
 *
 * --stand-ins  makes the images that FROM names out of this machine's Debian mirror, Node, npm and CUDA toolkit,
 *              where no registry of images can be reached
 * --only       one target alone
 * --storage    where images lie, kept for the next time; without it a temporary folder, which is removed
 */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Container, runOnce } from './container.js';
import { Storage, makeStandIns } from './storage.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const MAX_CPU_IMAGE_BYTES = 200e6;
const CUDA_FOLDER = '/usr/local/cuda-13.0';
/** of nobody: in no /etc/passwd, the group alone is 0, as OpenShift does it */
const ODD_USER = '1000680000:0';
const PORT = 18765;

const { values } = parseArgs({
  options: {
    'stand-ins': { type: 'boolean', default: false },
    only: { type: 'string' },
    storage: { type: 'string' },
  },
});
if (values.only !== undefined && values.only !== 'cpu' && values.only !== 'cuda') throw new Error('--only cpu or cuda');

function say(text: string): void {
  process.stdout.write(`container: ${text}\n`);
}

/** Defaults of the Dockerfile's arguments: the names of its base images. */
function dockerfileArgs(): Map<string, string> {
  const text = readFileSync(join(ROOT, 'Dockerfile'), 'utf8');
  return new Map([...text.matchAll(/^ARG (\w+)=(\S+)$/gm)].map(([, name, value]) => [name!, value!]));
}

async function ask(port: number): Promise<string> {
  const response = await fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'pocket-r1', messages: [{ role: 'user', content: 'What is 577 × 63?' }] }),
  });
  assert.equal(response.status, 200);
  const { choices } = (await response.json()) as { choices: { message: { content: string } }[] };
  return choices[0]!.message.content;
}

async function checkCpu(storage: Storage): Promise<void> {
  storage.build('cpu', 'rodin:cpu', ROOT);
  const bytes = storage.compressedBytes('rodin:cpu');
  say(`the cpu image has ${(bytes / 1e6).toFixed(1)} MB compressed`);
  assert.ok(bytes <= MAX_CPU_IMAGE_BYTES, `more than ${MAX_CPU_IMAGE_BYTES / 1e6} MB`);

  const config = storage.config('rodin:cpu');
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string };
  assert.equal(config.Labels['org.opencontainers.image.version'], version);
  assert.equal(config.User, '65532:65532');
  assert.deepEqual(Object.keys(config.ExposedPorts), ['8000/tcp']);
  const [kind, ...healthcheck] = config.Healthcheck.Test;
  assert.equal(kind, 'CMD');

  const root = storage.mount('rodin:cpu');
  const volumes = [[join(ROOT, 'models'), '/models']] as const;
  // A model on a volume, and the one inside, each as another user.
  for (const [user, model] of [
    [ODD_USER, '/models/pocket-r1'],
    [config.User, null],
  ] as const) {
    const env = [`RODIN_PORT=${PORT}`, 'RODIN_HOST=127.0.0.1', ...(model ? [`RODIN_MODEL=${model}`] : [])];
    const options = { root, config, user, env, volumes: model ? [...volumes] : [] };
    const doctor = runOnce(options, 'rodin', 'doctor');
    assert.equal(doctor.status, 0, doctor.text);
    const written = runOnce(options, 'sh', '-c', 'id -u; for f in / /tmp /opt/rodin /models; do touch $f/x; done');
    assert.match(written.text, new RegExp(`^${user.split(':')[0]}\n`));
    assert.equal(written.text.match(/Read-only file system/g)?.length, 4, written.text);

    const container = new Container(options);
    try {
      const [, folder] = await container.until(/Rodin serves pocket-r1 on http:\S+ \(cpu.*\)[\s\S]*Try:()/, 60);
      assert.equal(folder, '');
      const healthy = runOnce(options, ...healthcheck);
      assert.equal(healthy.status, 0, healthy.text);
      assert.match(await ask(PORT), /36351/);
      assert.equal(await container.stop(), 0, container.output);
      assert.match(container.output, /SIGTERM: finishing/);
      assert.notEqual(runOnce(options, ...healthcheck).status, 0);
    } finally {
      container.kill();
    }
    say(`user ${user}, read-only root, ${model ?? 'the model inside'}: answers, is healthy, ends on SIGTERM with 0`);
  }
}

/** The kernels are compiled and linked; without a driver the image says so and serves on the CPU. */
function checkCuda(storage: Storage): void {
  storage.build('cuda', 'rodin:cuda', ROOT);
  say(`the cuda image has ${(storage.compressedBytes('rodin:cuda') / 1e6).toFixed(1)} MB compressed`);
  const config = storage.config('rodin:cuda');
  assert.ok(config.Env.includes('NVIDIA_VISIBLE_DEVICES=all'));
  const { status, text } = runOnce(
    { root: storage.mount('rodin:cuda'), config, user: ODD_USER },
    ...config.Entrypoint,
    'doctor',
  );
  assert.equal(status, 0, text);
  assert.match(text, /cuda/);
  assert.doesNotMatch(text, /no CUDA kernels/);
  say('its addon has the kernels and loads without a driver');
}

const missing = Storage.missing(values['stand-ins']);
if (missing.length > 0) {
  process.stderr.write(`container: nothing was tested. ${missing.join('; ')}.\n`);
  process.exit(1);
}
const folder = values.storage ?? mkdtempSync(join(tmpdir(), 'rodin-container-'));
mkdirSync(folder, { recursive: true });
const storage = new Storage(folder);
try {
  if (values['stand-ins']) {
    if (values.only !== 'cpu' && !existsSync(join(CUDA_FOLDER, 'bin/nvcc'))) {
      throw new Error(`there is no ${CUDA_FOLDER}/bin/nvcc to stand in; test the other target with --only cpu`);
    }
    makeStandIns(storage, dockerfileArgs(), values.only === 'cpu' ? null : CUDA_FOLDER);
  }
  if (values.only !== 'cuda') await checkCpu(storage);
  if (values.only !== 'cpu') checkCuda(storage);
  say('done');
} finally {
  storage.removeContainers();
  if (values.storage === undefined) rmSync(folder, { recursive: true, force: true });
}
