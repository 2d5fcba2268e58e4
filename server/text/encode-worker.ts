/** Thread entry: answers EncodeJobs with token ids. */
import { parentPort, workerData } from 'node:worker_threads';
import type { EncodeJob, EncodeReply } from './encode-worker-client.js';
import { Tokenizer, type TokenizerFiles } from './tokenizer.js';

const tokenizer = new Tokenizer(workerData as TokenizerFiles);

parentPort!.on('message', ({ jobId, rendered, mark }: EncodeJob) => {
  let reply: EncodeReply;
  try {
    reply = { jobId, ids: tokenizer.encodeRendered(rendered, mark) };
  } catch (error) {
    reply = { jobId, message: (error as Error).message };
  }
  parentPort!.postMessage(reply);
});
