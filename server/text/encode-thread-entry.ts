/** Thread entry: answers EncodeJobs with token ids. */
import { parentPort, workerData } from 'node:worker_threads';
import { ApiError } from '../errors.js';
import { ChatTemplate } from './chat-template.js';
import { ConversationEncoder } from './conversation-encoder.js';
import type { EncodeJob, EncodeReply, EncodeThreadData } from './encode-thread.js';
import { Tokenizer } from './tokenizer.js';

const { files, templateSource, specialTokens } = workerData as EncodeThreadData;
const encoder = new ConversationEncoder(new Tokenizer(files), new ChatTemplate(templateSource, specialTokens));

parentPort!.on('message', ({ jobId, input }: EncodeJob) => {
  let reply: EncodeReply;
  try {
    reply = { jobId, ids: encoder.encode(input) };
  } catch (error) {
    const { code, param } = error instanceof ApiError ? error : { code: null, param: null };
    reply = { jobId, error: { code, message: (error as Error).message, param } };
  }
  parentPort!.postMessage(reply);
});
