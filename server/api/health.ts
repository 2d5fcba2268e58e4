import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

type Health = components['schemas']['Health'];

type Liveness = components['schemas']['Liveness'];

/**
 * An engine that hangs or dies is replaced by the process that answers here, which watches its steps; what counts is
 * whether it has given that up.
 */
export function getLiveness({ engine }: ApiContext, reply: FastifyReply): Liveness {
  const state = engine.state();
  if (state.status !== 'failed') return { status: 'live' };
  void reply.code(503);
  return { status: 'failed', reason: state.reason };
}

export function getHealth(
  context: ApiContext,
  request: FastifyRequest<{ Querystring: { live?: string } }>,
  reply: FastifyReply,
): Health | Liveness {
  if (request.query.live !== undefined) return getLiveness(context, reply);
  const health = healthOf(context);
  void reply.code(health.status === 'ready' ? 200 : 503);
  return health;
}

function healthOf({ engine, drain, modelNames }: ApiContext): Health {
  const model = modelNames[0]!;
  if (drain.isDraining) {
    return { status: 'shutting_down', model, reason: `waiting for ${drain.numRunning} completions to end` };
  }
  const state = engine.state();
  switch (state.status) {
    case 'ready': {
      const { numRunning, numWaiting } = engine.stats();
      return { status: 'ready', model, device: state.device, num_running: numRunning, num_waiting: numWaiting };
    }
    case 'loading':
    case 'restarting': {
      const reason = state.status === 'loading' ? 'the weights are being loaded' : state.reason;
      const progress = { loaded_bytes: state.loadedBytes, total_bytes: state.totalBytes };
      return { status: state.status, model, reason, ...progress };
    }
    case 'failed':
      return { status: 'failed', model, reason: state.reason };
    case 'closed':
      return { status: 'shutting_down', model, reason: 'the engine is closed' };
  }
}
