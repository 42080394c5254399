/*
 * A balloon whose work is done by libaerostat: what the balloons of all protocols
 * have in common
 *
 * The library's threads and device, what forbids to discard, and what moves along.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "migration/misc.h"
#include "migration/vmstate.h"
#include "system/runstate.h"
#include "aerostat-core.h"
#include "trace/trace-hw_virtio.h"

/* QEMU has one balloon at most. */
static AerostatCore *the_core;

void aerostat_core_complain(AerostatCore *core, const char *what)
{
    error_report("%s: %s: %s", object_get_typename(core->owner), what,
                 aerostat_last_error());
}

/* Called from the library's threads too, hence nothing but stdio. */
static void aerostat_core_log(void *opaque, int level, const char *message)
{
    fprintf(stderr, "aerostat: %s\n", message);
}

void aerostat_core_instance_init(AerostatCore *core, Object *owner)
{
    core->owner = owner;
    qemu_mutex_init(&core->inhibit_lock);
    aerostat_core_add_properties(core);
}

void aerostat_core_instance_finalize(AerostatCore *core)
{
    g_free(core->saved);
    qemu_mutex_destroy(&core->inhibit_lock);
}

/* The library's threads, and its device. */
bool aerostat_core_new(AerostatCore *core,
                       const struct aerostat_device_config *offer, Error **errp)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;

    aerostat_set_log(aerostat_core_log, NULL, AEROSTAT_LOG_WARN);
    threads.workers_per_node = core->workers;
    if (aerostat_runtime_new(&threads, &core->runtime) < 0 ||
        aerostat_device_new(core->runtime, offer, &core->device) < 0 ||
        aerostat_device_set_write_behind(core->device, core->write_behind_bytes,
                                         core->write_behind_ms) < 0) {
        error_setg(errp, "%s", aerostat_last_error());
        aerostat_core_free(core);
        return false;
    }
    return true;
}

void aerostat_core_free(AerostatCore *core)
{
    aerostat_device_destroy(&core->device);
    aerostat_runtime_destroy(&core->runtime);
}

/*
 * Discards are forbidden as soon as somebody pins memory (VFIO), while it is
 * filled from elsewhere (postcopy), and during a background snapshot. Nothing
 * is discarded any more when this returns.
 *
 * Called whenever that may have changed: for all that the guest says, when the VM
 * goes on, at the start and end of migrations, and by ram_block_discard_disable().
 */
void aerostat_core_update_inhibit(AerostatCore *core)
{
    bool inhibit = ram_block_discard_is_disabled() ||
                   migration_in_incoming_postcopy() ||
                   migration_in_bg_snapshot();

    QEMU_LOCK_GUARD(&core->inhibit_lock);
    if (inhibit == core->inhibited) {
        return;
    }
    core->inhibited = inhibit;
    trace_aerostat_balloon_inhibit(inhibit);
    if (inhibit) {
        aerostat_device_inhibit(core->device);
    } else {
        aerostat_device_uninhibit(core->device);
    }
}

/*
 * QEMU tells nobody that discards were forbidden. The linker does (--wrap, see
 * meson.build): callers of these two functions get these instead, so VFIO pins
 * nothing before what is in flight is discarded.
 */
int __real_ram_block_discard_disable(bool state);
int __real_ram_block_uncoordinated_discard_disable(bool state);
int __wrap_ram_block_discard_disable(bool state);
int __wrap_ram_block_uncoordinated_discard_disable(bool state);

int __wrap_ram_block_discard_disable(bool state)
{
    int ret = __real_ram_block_discard_disable(state);

    if (the_core) {
        aerostat_core_update_inhibit(the_core);
    }
    return ret;
}

int __wrap_ram_block_uncoordinated_discard_disable(bool state)
{
    int ret = __real_ram_block_uncoordinated_discard_disable(state);

    if (the_core) {
        aerostat_core_update_inhibit(the_core);
    }
    return ret;
}

static int aerostat_core_migration(NotifierWithReturn *notifier,
                                   MigrationEvent *event, Error **errp)
{
    aerostat_core_update_inhibit(container_of(notifier, AerostatCore,
                                              migration_notifier));
    return 0;
}

/* Takes part in what happens to the machine. */
void aerostat_core_attach(AerostatCore *core)
{
    aerostat_core_memory_init(core);
    the_core = core;
    aerostat_core_update_inhibit(core);
    migration_add_notifier(&core->migration_notifier, aerostat_core_migration);
}

/* The device must not be served any more. */
void aerostat_core_detach(AerostatCore *core)
{
    migration_remove_notifier(&core->migration_notifier);
    the_core = NULL;
    aerostat_core_memory_cleanup(core);
}

static int aerostat_core_forget_saved(void *opaque)
{
    AerostatCore *core = opaque;

    g_clear_pointer(&core->saved, g_free);
    core->saved_bytes = 0;
    return 0;
}

/* Nothing is in flight afterwards; the state is in core->saved. */
static int aerostat_core_save(void *opaque)
{
    AerostatCore *core = opaque;
    size_t bytes = 0;

    aerostat_core_forget_saved(core);
    if (aerostat_device_save(core->device, NULL, 0, &bytes) < 0 ||
        bytes > UINT32_MAX) {
        aerostat_core_complain(core, "the balloon cannot be saved");
        return -EINVAL;
    }
    core->saved = g_malloc(bytes);
    core->saved_bytes = bytes;
    if (aerostat_device_save(core->device, core->saved, bytes, &bytes) < 0) {
        aerostat_core_complain(core, "the balloon cannot be saved");
        return -EINVAL;
    }
    trace_aerostat_balloon_save(bytes);
    return 0;
}

/* The guest's memory and features have been loaded. */
int aerostat_core_restore(AerostatCore *core)
{
    int ret;

    aerostat_device_reset(core->device);
    ret = aerostat_device_restore(core->device, core->saved, core->saved_bytes);
    if (ret < 0) {
        aerostat_core_complain(core, "the balloon cannot be restored");
        return ret;
    }
    trace_aerostat_balloon_restore(core->saved_bytes);
    return aerostat_core_forget_saved(core);
}

const VMStateDescription vmstate_aerostat_core = {
    .name = "aerostat-core",
    .version_id = 1,
    .minimum_version_id = 1,
    /* What was saved last is still there when a snapshot is loaded. */
    .pre_load = aerostat_core_forget_saved,
    .pre_save = aerostat_core_save,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT32(saved_bytes, AerostatCore),
        VMSTATE_VBUFFER_ALLOC_UINT32(saved, AerostatCore, 1, NULL, saved_bytes),
        VMSTATE_END_OF_LIST()
    },
};
