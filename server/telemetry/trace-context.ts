import { randomBytes } from 'node:crypto';

/** Where a request's spans belong (W3C Trace Context). */
export interface TraceContext {
  traceId: string; // 32 hex digits
  /** the caller's span; null where the trace begins here */
  parentSpanId: string | null; // 16 hex digits
  /** false: the caller has decided that nobody keeps this trace */
  isSampled: boolean;
}

const TRACEPARENT = /^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$/;
const SAMPLED = 1;

/** The caller's trace, or a new one: a header that is not valid counts as none, as the recommendation says. */
export function readTraceContext(traceparent: string | string[] | undefined): TraceContext {
  const match = typeof traceparent === 'string' ? TRACEPARENT.exec(traceparent.trim()) : null;
  const [, version, traceId, parentSpanId, flags, rest] = match ?? [];
  const isValid =
    match !== null &&
    version !== 'ff' &&
    !(version === '00' && rest !== undefined) &&
    /[^0]/.test(traceId!) &&
    /[^0]/.test(parentSpanId!);
  if (!isValid) return { traceId: randomBytes(16).toString('hex'), parentSpanId: null, isSampled: true };
  return { traceId: traceId!, parentSpanId: parentSpanId!, isSampled: (parseInt(flags!, 16) & SAMPLED) !== 0 };
}

export function newSpanId(): string {
  return randomBytes(8).toString('hex');
}
