/** An API process in small: starts an engine process, tells its id to whoever started it, and waits to be killed. */
import { EngineClient } from '../../server/engine/process.js';

const client = new EngineClient({
  entry: process.argv[2]!,
  config: {
    model: 'works',
    device: 'cpu',
    compute: 'auto',
    cpuPath: 'auto',
    numThreads: 1,
    blockSize: 4,
    cacheMemory: null,
    gpuMemoryUtilization: null,
    kvCacheDtype: 'auto',
    deterministic: true,
    maxModelLen: null,
    maxStepTokens: 32,
    maxNumSeqs: 16,
    maxQueue: 100,
    speculativeTokens: 0,
  },
});
await client.ready();
process.send!(client.pid);
