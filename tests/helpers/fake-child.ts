/** Entry of an engine process with the fake runner: the real channel and host around it. */
import { Engine } from '../../server/engine/engine.js';
import { hostEngine } from '../../server/engine/host.js';
import { StartupError } from '../../server/errors.js';
import { FakeRunner } from './fake-runner.js';

export const FAKE_VOCAB_SIZE = 97;
const SETUP = { blockSize: 4, numBlocks: 64, maxStepTokens: 32, maxNumSeqs: 16 };

/** config.model chooses the behaviour; 'hangs' loads and then blocks its event loop. */
hostEngine(
  async (config, onProgress) => {
    onProgress(1, 2);
    if (config.model === 'refused') throw new StartupError('model.safetensors: tensor "x" is missing.');
    if (config.model === 'crashes') process.kill(process.pid, 'SIGKILL');
    const runner = new FakeRunner({ vocabSize: FAKE_VOCAB_SIZE, ...SETUP });
    runner.isBroken = config.model === 'broken';
    if (config.model === 'stalls') runner.step = () => new Promise(() => {});
    if (config.model === 'hangs') setTimeout(() => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0), 200);
    return new Engine(runner, {
      ...SETUP,
      fingerprint: 'fake',
      limits: { vocabSize: FAKE_VOCAB_SIZE, maxContext: 256, maxOpen: 128 },
      hasCacheEvents: config.hasCacheEvents === true,
      info: { device: 'fake', weightBytes: 1, cacheBytes: 2 },
    });
  },
  (code) => process.exit(code),
);
