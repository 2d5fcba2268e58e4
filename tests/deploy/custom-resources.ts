/** The custom resources in deploy/, as far as their published definitions have fields that could stand there. */
import type { PodTemplateSpec } from 'kubernetes-types/core/v1.js';
import type { LabelSelector, ObjectMeta } from 'kubernetes-types/meta/v1.js';

/** monitoring.coreos.com, the Prometheus operator */
export interface PodMonitor {
  apiVersion: 'monitoring.coreos.com/v1';
  kind: 'PodMonitor';
  metadata: ObjectMeta;
  spec: {
    selector: LabelSelector;
    podMetricsEndpoints: {
      port?: string;
      portNumber?: number;
      path?: string;
      scheme?: 'http' | 'https';
      interval?: string;
      scrapeTimeout?: string;
      honorLabels?: boolean;
      authorization?: { type?: string; credentials?: { name?: string; key: string; optional?: boolean } };
    }[];
    namespaceSelector?: { any?: boolean; matchNames?: string[] };
    jobLabel?: string;
    podTargetLabels?: string[];
  };
}

/** Gateway API Inference Extension, v1 */
export interface InferencePool {
  apiVersion: 'inference.networking.k8s.io/v1';
  kind: 'InferencePool';
  metadata: ObjectMeta;
  spec: {
    selector: { matchLabels: Record<string, string> };
    targetPorts: { number: number }[];
    appProtocol?: 'http' | 'kubernetes.io/h2c';
    endpointPickerRef: {
      group?: string;
      kind?: string;
      name: string;
      port?: { number: number };
      failureMode?: 'FailOpen' | 'FailClose';
    };
  };
}

/** Gateway API, v1 */
export interface HTTPRoute {
  apiVersion: 'gateway.networking.k8s.io/v1';
  kind: 'HTTPRoute';
  metadata: ObjectMeta;
  spec: {
    parentRefs?: {
      group?: string;
      kind?: string;
      namespace?: string;
      name: string;
      sectionName?: string;
      port?: number;
    }[];
    hostnames?: string[];
    rules?: {
      name?: string;
      matches?: { path?: { type?: 'Exact' | 'PathPrefix' | 'RegularExpression'; value?: string }; method?: string }[];
      backendRefs?: {
        group?: string;
        kind?: string;
        name: string;
        namespace?: string;
        port?: number;
        weight?: number;
      }[];
      timeouts?: { request?: string; backendRequest?: string };
    }[];
  };
}

/** LeaderWorkerSet, v1 */
export interface LeaderWorkerSet {
  apiVersion: 'leaderworkerset.x-k8s.io/v1';
  kind: 'LeaderWorkerSet';
  metadata: ObjectMeta;
  spec: {
    replicas?: number;
    leaderWorkerTemplate: {
      leaderTemplate?: PodTemplateSpec;
      workerTemplate: PodTemplateSpec;
      size?: number;
      restartPolicy?: 'RecreateGroupOnPodRestart' | 'RecreateGroupAfterStart' | 'None' | 'Default';
    };
    rolloutStrategy?: {
      type: 'RollingUpdate';
      rollingUpdateConfiguration?: {
        partition?: number;
        maxUnavailable?: number | string;
        maxSurge?: number | string;
      };
    };
    startupPolicy?: 'LeaderCreated' | 'LeaderReady';
    networkConfig?: { subdomainPolicy: 'Shared' | 'UniquePerReplica' };
  };
}

/** kubectl's own */
export interface Kustomization {
  apiVersion: 'kustomize.config.k8s.io/v1beta1';
  kind: 'Kustomization';
  resources?: string[];
  components?: string[];
}

export interface Component {
  apiVersion: 'kustomize.config.k8s.io/v1alpha1';
  kind: 'Component';
  resources?: string[];
  patches?: { target: { kind: string; name: string }; path: string }[];
}
