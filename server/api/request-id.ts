import { randomUUID } from 'node:crypto';
import type { IncomingMessage } from 'node:http';

/** What a proxy may call a request: short, and nothing that would break a log line or a header. */
const GIVEN = /^[\w.:@+/=-]{1,128}$/;

/** The caller's x-request-id where it has a usable one, so that one name follows a request through all logs. */
export function requestIdFor({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers['x-request-id'];
  if (typeof given === 'string' && GIVEN.test(given)) return given;
  return `req_${randomUUID().replaceAll('-', '')}`;
}
