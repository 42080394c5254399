/*
 * A virtio balloon whose work is done by libaerostat: what the monitor sees
 *
 * QMP's balloon, query-balloon, BALLOON_CHANGE, guest-stats and
 * guest-stats-polling-interval as every balloon device of QEMU has them, and
 * this library's books and history.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-events-machine.h"
#include "qapi/visitor.h"
#include "qemu/cutils.h"
#include "qemu/timer.h"
#include "hw/boards.h"
#include "hw/mem/memory-device.h"
#include "system/numa.h"
#include "system/balloon.h"
#include "aerostat-balloon.h"
#include "trace/trace-hw_virtio.h"

/* The names are those of QEMU's interface. */
static const char *const stat_names[AEROSTAT_STATS] = {
    [AEROSTAT_STAT_SWAP_IN] = "stat-swap-in",
    [AEROSTAT_STAT_SWAP_OUT] = "stat-swap-out",
    [AEROSTAT_STAT_MAJFLT] = "stat-major-faults",
    [AEROSTAT_STAT_MINFLT] = "stat-minor-faults",
    [AEROSTAT_STAT_MEMFREE] = "stat-free-memory",
    [AEROSTAT_STAT_MEMTOT] = "stat-total-memory",
    [AEROSTAT_STAT_AVAIL] = "stat-available-memory",
    [AEROSTAT_STAT_CACHES] = "stat-disk-caches",
    [AEROSTAT_STAT_HTLB_PGALLOC] = "stat-htlb-pgalloc",
    [AEROSTAT_STAT_HTLB_PGFAIL] = "stat-htlb-pgfail",
    [AEROSTAT_STAT_OOM_KILL] = "stat-oom-kills",
    [AEROSTAT_STAT_ALLOC_STALL] = "stat-alloc-stalls",
    [AEROSTAT_STAT_ASYNC_SCAN] = "stat-async-scans",
    [AEROSTAT_STAT_DIRECT_SCAN] = "stat-direct-scans",
    [AEROSTAT_STAT_ASYNC_RECLAIM] = "stat-async-reclaims",
    [AEROSTAT_STAT_DIRECT_RECLAIM] = "stat-direct-reclaims",
};

/* The guest's memory without a balloon; QMP's values are what a balloon leaves. */
uint64_t aerostat_core_ram_bytes(void)
{
    MachineState *machine = MACHINE(qdev_get_machine());

    return machine->ram_size +
           (machine->device_memory ? machine->device_memory->dimm_size : 0);
}

static void aerostat_balloon_to_target(void *opaque, ram_addr_t left)
{
    AerostatCore *core = opaque;
    uint64_t ram = aerostat_core_ram_bytes();
    uint64_t target = ram - MIN(left, ram);

    if (!left) {
        return;
    }
    trace_aerostat_balloon_target(target);
    if (aerostat_device_set_target(core->device, target) < 0) {
        aerostat_core_complain(core, "the target is refused");
    }
}

/* A virtio-balloon's is what the guest writes, and may be more than it has. */
static uint64_t actual_bytes(AerostatCore *core)
{
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;

    aerostat_device_query(core->device, &balloon);
    return MIN(balloon.actual_bytes, aerostat_core_ram_bytes());
}

static void aerostat_balloon_status(void *opaque, BalloonInfo *info)
{
    info->actual = aerostat_core_ram_bytes() - actual_bytes(opaque);
}

void aerostat_core_announce_actual(AerostatCore *core)
{
    uint64_t actual = actual_bytes(core);

    if (actual == core->announced_bytes) {
        return;
    }
    core->announced_bytes = actual;
    trace_aerostat_balloon_actual(actual);
    qapi_event_send_balloon_change(aerostat_core_ram_bytes() - actual);
}

bool aerostat_core_monitor_init(AerostatCore *core, Error **errp)
{
    if (qemu_add_balloon_handler(aerostat_balloon_to_target,
                                 aerostat_balloon_status, core) < 0) {
        error_setg(errp, "Only one balloon device is supported");
        return false;
    }
    return true;
}

void aerostat_core_monitor_cleanup(AerostatCore *core)
{
    qemu_remove_balloon_handler(core);
}

/* A statistic that the guest did not send is -1, as unsigned as all of them. */
static void get_guest_stats(Object *obj, Visitor *v, const char *name,
                            void *opaque, Error **errp)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(obj);
    struct aerostat_guest_stats stats = AEROSTAT_GUEST_STATS_INIT;
    int64_t updated = 0;
    int i;

    if (s->core.device) {
        aerostat_device_guest_stats(s->core.device, 0, &stats);
    }
    if (stats.present) {
        updated = (g_get_real_time() / 1000 - (int64_t)stats.age_ms) / 1000;
    }
    if (!visit_start_struct(v, name, NULL, 0, errp)) {
        return;
    }
    if (visit_type_int64(v, "last-update", &updated, errp) &&
        visit_start_struct(v, "stats", NULL, 0, errp)) {
        for (i = 0; i < AEROSTAT_STATS; i++) {
            uint64_t value = stats.present & (1u << i) ? stats.values[i]
                                                       : UINT64_MAX;

            if (!visit_type_uint64(v, stat_names[i], &value, errp)) {
                break;
            }
        }
        if (i == AEROSTAT_STATS) {
            visit_check_struct(v, errp);
        }
        visit_end_struct(v, NULL);
    }
    visit_end_struct(v, NULL);
}

static void get_stats_interval(Object *obj, Visitor *v, const char *name,
                               void *opaque, Error **errp)
{
    visit_type_int(v, name, &AEROSTAT_BALLOON(obj)->stats_interval_s, errp);
}

static void set_stats_interval(Object *obj, Visitor *v, const char *name,
                               void *opaque, Error **errp)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(obj);
    int64_t seconds;

    if (!visit_type_int(v, name, &seconds, errp)) {
        return;
    }
    if (seconds < 0 || seconds > UINT32_MAX / 1000) {
        error_setg(errp, "%s takes 0 to %u seconds", name, UINT32_MAX / 1000);
        return;
    }
    s->stats_interval_s = seconds;
    if (s->core.device) {
        aerostat_device_set_stats_interval(s->core.device, seconds * 1000);
    }
}

static bool visit_counter(Visitor *v, const char *name, uint64_t value,
                          Error **errp)
{
    return visit_type_uint64(v, name, &value, errp);
}

static bool visit_flow(Visitor *v, const char *name,
                       const struct aerostat_flow *flow, Error **errp)
{
    bool ok;

    if (!visit_start_struct(v, name, NULL, 0, errp)) {
        return false;
    }
    ok = visit_counter(v, "requested-bytes", flow->requested_bytes, errp) &&
         visit_counter(v, "discarded-bytes", flow->discarded_bytes, errp) &&
         visit_counter(v, "pending-bytes", flow->pending_bytes, errp) &&
         visit_counter(v, "held-bytes", flow->held_bytes, errp) &&
         visit_counter(v, "reopened-bytes", flow->reopened_bytes, errp) &&
         visit_counter(v, "withdrawn-bytes", flow->withdrawn_bytes, errp) &&
         visit_counter(v, "inhibited-bytes", flow->skipped_inhibited_bytes,
                       errp) &&
         visit_counter(v, "out-of-range-bytes",
                       flow->skipped_out_of_range_bytes, errp) &&
         visit_counter(v, "duplicate-bytes", flow->skipped_duplicate_bytes,
                       errp) &&
         visit_counter(v, "pinned-bytes", flow->skipped_pinned_bytes, errp) &&
         visit_counter(v, "over-target-bytes",
                       flow->skipped_over_target_bytes, errp) &&
         visit_counter(v, "late-bytes", flow->skipped_late_bytes, errp) &&
         visit_counter(v, "partial-bytes", flow->skipped_partial_bytes,
                       errp) &&
         visit_counter(v, "failed-bytes", flow->skipped_failed_bytes, errp) &&
         visit_check_struct(v, errp);
    visit_end_struct(v, NULL);
    return ok;
}

/* The books: what became of every byte that the guest handed over. */
static void get_counters(Object *obj, Visitor *v, const char *name,
                         void *opaque, Error **errp)
{
    AerostatCore *core = opaque;
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;

    if (core->device) {
        aerostat_device_counters(core->device, &counters);
        aerostat_device_query(core->device, &balloon);
    }
    if (!visit_start_struct(v, name, NULL, 0, errp)) {
        return;
    }
    if (visit_flow(v, "balloon", &counters.balloon, errp) &&
        visit_flow(v, "report", &counters.report, errp) &&
        visit_counter(v, "target-bytes", balloon.target_bytes, errp) &&
        visit_counter(v, "actual-bytes", balloon.actual_bytes, errp) &&
        visit_counter(v, "ballooned-bytes", balloon.ballooned_bytes, errp) &&
        visit_counter(v, "refused-bytes", counters.refused_bytes, errp) &&
        visit_counter(v, "returned-bytes", counters.returned_bytes, errp) &&
        visit_counter(v, "discard-calls", counters.discard_calls, errp) &&
        visit_counter(v, "discard-ranges", counters.discard_ranges, errp) &&
        visit_counter(v, "discard-ns", counters.discard_ns, errp) &&
        visit_counter(v, "chain-errors", counters.chain_errors, errp) &&
        visit_counter(v, "handshakes", counters.handshakes, errp) &&
        visit_counter(v, "host-resets", counters.host_resets, errp) &&
        visit_counter(v, "host-resets-acknowledged",
                      counters.host_resets_acknowledged, errp) &&
        visit_counter(v, "hint-chains", counters.hint_chains, errp) &&
        visit_counter(v, "hinted-bytes", core->hinted_bytes, errp)) {
        visit_check_struct(v, errp);
    }
    visit_end_struct(v, NULL);
}

static const char *event_name(uint32_t event)
{
    static const char *const names[] = {
        [AEROSTAT_HISTORY_TARGET_SET] = "target-set",
        [AEROSTAT_HISTORY_ACTUAL_WRITTEN] = "actual-written",
        [AEROSTAT_HISTORY_RESET] = "reset",
        [AEROSTAT_HISTORY_INHIBITED] = "inhibited",
        [AEROSTAT_HISTORY_UNINHIBITED] = "uninhibited",
        [AEROSTAT_HISTORY_NEEDS_RESET] = "needs-reset",
        [AEROSTAT_HISTORY_RESTORED] = "restored",
        [AEROSTAT_HISTORY_BALLOON_RESET] = "balloon-reset",
    };

    return event < ARRAY_SIZE(names) && names[event] ? names[event] : "other";
}

/* "What happened with the balloon?": a line each, the oldest first. */
static void get_history(Object *obj, Visitor *v, const char *name,
                        void *opaque, Error **errp)
{
    enum { MAX = 1024 };
    AerostatCore *core = opaque;
    g_autofree struct aerostat_history_entry *entries =
        g_new(struct aerostat_history_entry, MAX);
    g_autoptr(GString) text = g_string_new("");
    int i, n = 0;

    if (core->device) {
        n = aerostat_device_history(core->device, 0, entries, MAX);
    }
    for (i = 0; i < n; i++) {
        g_string_append_printf(text, "%.3f %s target %" PRIu64
                               " actual %" PRIu64 " ballooned %" PRIu64 "\n",
                               entries[i].monotonic_ns / 1e9,
                               event_name(entries[i].event),
                               entries[i].target_bytes,
                               entries[i].actual_bytes,
                               entries[i].ballooned_bytes);
    }
    visit_type_str(v, name, &text->str, errp);
}

/* Of protocols in which the guest tells of its memory. */
void aerostat_balloon_add_stats_properties(Object *obj)
{
    object_property_add(obj, "guest-stats", "guest statistics",
                        get_guest_stats, NULL, NULL, NULL);
    object_property_add(obj, "guest-stats-polling-interval", "int",
                        get_stats_interval, set_stats_interval, NULL, NULL);
}

/* The highest number of the guest's nodes. */
static uint32_t last_node(void)
{
    MachineState *machine = MACHINE(qdev_get_machine());
    int nodes = machine->numa_state ? machine->numa_state->num_nodes : 0;

    return nodes ? nodes - 1 : 0;
}

/*
 * What is in the balloon of each node of the guest, in bytes: "N,N,...", from
 * node 0 on. Known of every driver. Or their targets: the same, or nothing where
 * there is one for the whole balloon.
 */
static void get_nodes(Object *obj, Visitor *v, const char *name, void *opaque,
                      Error **errp)
{
    AerostatCore *core = opaque;
    bool targets = g_str_equal(name, "node-targets");
    g_autoptr(GString) text = g_string_new("");
    uint32_t node;

    for (node = 0; core->device && node <= last_node(); node++) {
        struct aerostat_node_balloon balloon = AEROSTAT_NODE_BALLOON_INIT;

        aerostat_device_query_node(core->device, node, &balloon);
        if (targets && balloon.target_bytes == AEROSTAT_NO_TARGET) {
            break;
        }
        g_string_append_printf(text, "%s%" PRIu64, node ? "," : "",
                               targets ? balloon.target_bytes
                                       : balloon.ballooned_bytes);
    }
    visit_type_str(v, name, &text->str, errp);
}

static void set_node_targets(Object *obj, Visitor *v, const char *name,
                             void *opaque, Error **errp)
{
    AerostatCore *core = opaque;
    uint64_t targets[AEROSTAT_TARGET_NODES];
    g_autofree char *text = NULL;
    g_auto(GStrv) words = NULL;
    size_t n;

    if (!visit_type_str(v, name, &text, errp)) {
        return;
    }
    words = g_strsplit(text, ",", 0);
    for (n = 0; words[n]; n++) {
        if (n == ARRAY_SIZE(targets) ||
            qemu_strtosz(words[n], NULL, &targets[n]) < 0) {
            error_setg(errp, "%s takes up to %zu sizes: N,N,...", name,
                       ARRAY_SIZE(targets));
            return;
        }
    }
    if (aerostat_device_set_node_targets(core->device, targets, n) < 0) {
        error_setg(errp, "%s", aerostat_last_error());
    }
}

/* Gives the guest all that is in the balloon, where its driver understands it. */
static void set_reset_balloon(Object *obj, Visitor *v, const char *name,
                              void *opaque, Error **errp)
{
    AerostatCore *core = opaque;
    bool reset;

    if (visit_type_bool(v, name, &reset, errp) && reset &&
        aerostat_device_reset_balloon(core->device) < 0) {
        error_setg(errp, "%s", aerostat_last_error());
    }
}

void aerostat_core_add_properties(AerostatCore *core)
{
    Object *obj = core->owner;

    object_property_add(obj, "counters", "books", get_counters, NULL, NULL,
                        core);
    object_property_add(obj, "node-ballooned", "string", get_nodes, NULL, NULL,
                        core);
    object_property_add(obj, "node-targets", "string", get_nodes,
                        set_node_targets, NULL, core);
    object_property_add(obj, "reset-balloon", "bool", NULL, set_reset_balloon,
                        NULL, core);
    object_property_add(obj, "balloon-history", "string", get_history, NULL,
                        NULL, core);
}
