// The gradient of the posterior over lists.
//
// Let w = softmax(l / T) over the list, and gL, gE, gb, gS the gradients for log_z, mean_logit, mean_bias and
// weight_sq. With h = <g, y> + gE l + gb b + 2 gS w and q = w (gL + gE + (h - sum w h) / T):
// - grad_x = sum q (alpha y - x) / sigma^2
// - grad_sigma = sum q r^2 / sigma^3
// - grad_alpha = sum q <x - alpha y, y> / sigma^2
// - grad_T = gL (L - E) / T - sum w (l - E) h / T^2
// - grad_b = q + gb w
//
// At sigma = 0 only the nearest rows have weight, and only the bias and the temperature still move it.
//
// The weights are computed anew in double. Three passes follow each other, because the coefficients of a
// query need the products of its whole list: products of each piece, coefficients of each query, and the sum
// over each piece's rows.
#pragma once
#include "cpu/listed/listed-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

struct ListedBackward {
  const ListedRows* p;
  const Queries* in;
  const RowLists* list;
  const SumsIn* grads;
  const Gradients* out;
  // For each listed row [M]:
  double* t;   // its weight, later q
  double* gy;  // <g, y>, later what the bias gets
  double* xy;  // <x - alpha y, y>
  double* r2;  // |x - alpha y|^2
};

// One pass over a piece's rows: r^2, <g, y>, <x - alpha y, y>. Returns kDone or kStopped.
static int listed_products(const ListedBackward& s, const Piece& c, const double* x, double* row,
                           Pace& pace) {
  enum { W = Vec<double>::W };
  const ListedRows& p = *s.p;
  const int64_t D = p.src.rows.d;
  const double *g = s.grads->mean + c.b * D, alpha = s.in->alpha[c.b];
  for (int64_t i = c.i0; i < c.i1; i++) {
    if (pace.stopped(3 * D)) return kStopped;
    s.r2[i] = p.exact(p.src, s.list->index[i], x, alpha);
    p.values(p.src, s.list->index[i], 0, D, row);
    Vec<double>::T vg = {}, vx = {};
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const Vec<double>::T y = load(row + d);
      vg += load(g + d) * y;
      vx += (load(x + d) - y * alpha) * y;
    }
    double sg = hsum<double>(vg), sx = hsum<double>(vx);
    for (; d < D; d++) {
      sg += g[d] * row[d];
      sx += (x[d] - alpha * row[d]) * row[d];
    }
    s.gy[i] = sg;
    s.xy[i] = sx;
  }
  return kDone;
}

// From products to the coefficients of one query, and all its gradients but the sum over rows in grad_x.
static void listed_coefficients(const ListedBackward& s, int64_t b, Query<double>& q) {
  const SumsIn& grads = *s.grads;
  const int64_t i0 = s.list->start[b], count = s.list->start[b + 1] - i0;
  const int64_t* n = s.list->index + i0;
  double *t = s.t + i0, *gy = s.gy + i0, *xy = s.xy + i0, *r2 = s.r2 + i0;
  memcpy(t, r2, count * sizeof(double));
  const State st = weigh_listed(q, s.in->bias, n, t, count);
  if (st.s != st.s) {
    q.mode = kNotFinite;
    return;
  }
  const bool zero_sigma = q.mode == kZeroSigma, finite = !zero_sigma || st.key == 0, any = st.s > 0;
  const double T = q.temperature;
  // Logits relative to the nearest row, beside which a bias and what differs would be lost where it is far.
  double least = kInf, E = 0;
  for (int64_t i = 0; i < count; i++)
    if (t[i] > 0) least = dmin(least, r2[i]);
  const auto logit = [&](int64_t i) {
    const double bn = s.in->bias ? s.in->bias[n[i]] : 0;
    return zero_sigma ? bn : bn - 0.5 * ((r2[i] - least) / q.sigma) / q.sigma;
  };
  for (int64_t i = 0; any && i < count; i++)
    if (t[i] > 0) E += t[i] / st.s * logit(i);
  const double gap = any ? T * (__builtin_log(st.s) - st.s_v / st.s) : 0;  // log_z - mean_logit
  const double gL = finite ? grads.log_z[b] : 0, gE = finite ? grads.mean_logit[b] : 0;
  const double gb = grads.mean_bias[b], gS = grads.weight_sq[b];
  double mean_h = 0, sigma = 0, alpha = 0, temp = 0;
  for (int64_t i = 0; i < count; i++) {
    const double bn = s.in->bias ? s.in->bias[n[i]] : 0, w = any ? t[i] / st.s : 0;
    t[i] = w;
    if (w == 0) continue;
    gy[i] += gE * (logit(i) - E) + gb * bn + 2 * gS * w;  // h, but for a constant
    mean_h += w * gy[i];
  }
  const double is2 = zero_sigma ? 0 : 1 / q.sigma / q.sigma;
  for (int64_t i = 0; i < count; i++) {
    const double w = t[i];
    if (w == 0) {
      t[i] = gy[i] = 0;
      continue;
    }
    const double h = gy[i] - mean_h, c = w * (gL + gE + h / T);
    temp += w * (logit(i) - E) * h;
    if (!zero_sigma) {
      sigma += c * ((r2[i] / q.sigma) / q.sigma);
      alpha += c * xy[i];
    }
    gy[i] = c + gb * w;
    t[i] = zero_sigma ? 0 : c;
  }
  s.out->sigma[b] = zero_sigma ? 0 : sigma / q.sigma;
  s.out->alpha[b] = alpha * is2;
  s.out->temperature[b] = gL * gap / T - temp / T / T;
}

static void listed_backward_finish(const ListedBackward& s, const Piece& c, const Query<double>& q,
                                   const double* x) {
  const int64_t D = s.p->src.rows.d;
  const bool not_finite = q.mode == kNotFinite, constant = not_finite || q.mode == kZeroSigma;
  double total = 0;
  for (int64_t i = s.list->start[c.b]; !not_finite && i < s.list->start[c.b + 1]; i++) total += s.t[i];
  const double v = not_finite ? __builtin_nan("") : 0;
  for (int64_t d = 0; d < D; d++)
    write_number(s.out->x, s.in->f64, c.b * D + d,
                 constant ? v : (q.alpha * c.sum[d] - x[d] * total) / q.sigma / q.sigma);
  if (not_finite) s.out->sigma[c.b] = s.out->alpha[c.b] = s.out->temperature[c.b] = v;
}

static int run_posterior_listed_backward(const Rows& rows, const Queries& in, const RowLists& list,
                                         const SumsIn& grads, const Gradients& out, int threads) {
  if (out.bias) memset((void*)out.bias, 0, rows.n * sizeof(double));
  if (in.b == 0) return kDone;
  if (!valid(list, in.b, rows.n)) return kNotLists;
  const ListedRows p(rows);
  Arena arena, joined;
  const int64_t D = rows.d, Dp = round_up(D, 64), M = list.count,
                count = cut_lists(list, in.b, threads, nullptr);
  if (!arena.reserve(Arena::bytes<Piece>(count) + 4 * Arena::bytes<double>(M) +
                     Arena::bytes<Query<double>>(in.b)))
    return kNoMemory;
  Piece* pieces = arena.take<Piece>(count);
  Query<double>* queries = arena.take<Query<double>>(in.b);
  double *t = arena.take<double>(M), *gy = arena.take<double>(M);
  double *xy = arena.take<double>(M), *r2 = arena.take<double>(M);
  cut_lists(list, in.b, threads, pieces);
  const int64_t joins = place_sums(pieces, count, 0, nullptr);
  if (!joined.reserve(Arena::bytes<double>(joins * Dp) + Arena::bytes<double>(Dp))) return kNoMemory;
  place_sums(pieces, count, Dp, joined.take<double>(joins * Dp));
  double* wide = joined.take<double>(Dp);
  const ListedBackward s = {&p, &in, &list, &grads, &out, t, gy, xy, r2};
  const int workers = (int)imax(1, imin(threads, count));
  WorkSpaces<ListedWork> own(workers);
  if (!own.reserve(in, D)) return kNoMemory;
  int failed = for_parts(workers, count, [&](int64_t k, int worker) {
    ListedWork& w = own.items[worker];
    return listed_products(s, pieces[k], query_in_double(in, pieces[k].b, D, w.x), w.sum, w.pace);
  });
  if (failed) return failed;
  for_parts(workers, in.b, [&](int64_t b, int worker) {
    queries[b] = listed_query(in, query_in_double(in, b, D, own.items[worker].x), b, D);
    if (queries[b].mode != kNotFinite) listed_coefficients(s, b, queries[b]);
    return (int)kDone;
  });
  failed = for_parts(workers, count, [&](int64_t k, int worker) {
    Piece& c = pieces[k];
    ListedWork& w = own.items[worker];
    if (queries[c.b].mode == kNotFinite) return (int)kDone;
    if (c.alone) {
      c.sum = w.sum;
      memset((void*)w.sum, 0, D * sizeof(double));
    }
    const int status = add_rows(p, list.index + c.i0, t + c.i0, c.i1 - c.i0, 0, c.sum, w.pace);
    if (c.alone && !status) listed_backward_finish(s, c, queries[c.b], query_in_double(in, c.b, D, w.x));
    return status;
  });
  for (int64_t k = 0; k < count && !failed;) {
    Piece& a = pieces[k++];
    const Query<double>& q = queries[a.b];
    for (; k < count && pieces[k].b == a.b; k++)
      for (int64_t d = 0; d < D && q.mode != kNotFinite; d++) a.sum[d] += pieces[k].sum[d];
    if (!a.alone || q.mode == kNotFinite) listed_backward_finish(s, a, q, query_in_double(in, a.b, D, wide));
  }
  if (!out.bias || failed) return failed;
  for (int64_t b = 0; b < in.b; b++) {  // in order, so that any number of threads gives the same
    if (queries[b].mode == kNotFinite) out.bias[0] = __builtin_nan("");
    for (int64_t i = list.start[b]; queries[b].mode != kNotFinite && i < list.start[b + 1]; i++)
      out.bias[list.index[i]] += gy[i];
  }
  return kDone;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
