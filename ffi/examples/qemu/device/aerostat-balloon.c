/*
 * A virtio balloon whose work is done by libaerostat: the virtio side, whatever
 * the protocol
 *
 * QEMU keeps the virtqueues, so that vIOMMU, dirty logging, packed rings and
 * migration work as for any other device: elements are popped here and handed
 * to the library with their address as token. It completes them in batches
 * behind an eventfd, which the main loop waits for; the library never calls
 * QEMU. Everything here runs with the BQL held.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "hw/qdev-properties.h"
#include "hw/virtio/virtio.h"
#include "hw/virtio/virtio-bus.h"
#include "migration/vmstate.h"
#include "aerostat-balloon.h"
#include "trace/trace-hw_virtio.h"

/* Linux reports up to 32 ranges a buffer; the ring is to hold some of them. */
#define QUEUE_SIZE 128
#define BATCH 128

static void aerostat_balloon_collect(AerostatBalloon *s);

/*
 * Behind the acknowledgement only the books are kept while the guest waits: its
 * own processor does that, as there is no ioeventfd, rather than wake the main
 * loop, which wakes another thread, which wakes it again.
 */
static bool aerostat_balloon_serve_here(AerostatBalloon *s, unsigned int queue)
{
    return s->core.write_behind_bytes &&
           AEROSTAT_BALLOON_GET_CLASS(s)->served_here(s) & (1u << queue);
}

/* The other end of every queue: hands over all that the guest has queued. */
static void aerostat_balloon_handle_output(VirtIODevice *vdev, VirtQueue *vq)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);
    struct aerostat_element batch[BATCH];
    VirtQueueElement *elem;
    unsigned int queue = virtio_get_queue_index(vq);
    bool here = aerostat_balloon_serve_here(s, queue);
    unsigned int n;

    /* Drivers kick before DRIVER_OK, too: all queues are looked at then. */
    if (aerostat_device_state(s->core.device) != AEROSTAT_STATE_ACTIVE) {
        return;
    }
    aerostat_core_update_inhibit(&s->core);
    do {
        for (n = 0; n < BATCH; n++) {
            elem = virtqueue_pop(vq, sizeof(*elem));
            if (!elem) {
                break;
            }
            batch[n] = (struct aerostat_element) {
                .token = (uintptr_t)elem,
                .readable = elem->out_sg,
                .n_readable = elem->out_num,
                .writable = elem->in_sg,
                .n_writable = elem->in_num,
                .queue = queue,
                .flags = here ? AEROSTAT_ELEMENT_HERE : 0,
            };
        }
        if (!n) {
            break;
        }
        trace_aerostat_balloon_submit(queue, n);
        if (aerostat_device_submit(s->core.device, batch, n) < 0) {
            aerostat_core_complain(&s->core, "elements are not taken");
            while (n--) {
                elem = (VirtQueueElement *)(uintptr_t)batch[n].token;
                virtqueue_unpop(vq, elem, 0);
                g_free(elem);
            }
            return;
        }
        s->outstanding[queue] += n;
        if (here) {
            event_notifier_test_and_clear(&s->completions);
            aerostat_balloon_collect(s);
        }
    } while (n == BATCH);
}

/*
 * Takes what the library is done with. What it did not serve goes back to the
 * available ring, last one first.
 */
static void aerostat_balloon_collect(AerostatBalloon *s)
{
    struct aerostat_completion done[BATCH];
    unsigned int filled[AEROSTAT_BALLOON_QUEUES] = {};
    GPtrArray *unserved[AEROSTAT_BALLOON_QUEUES] = {};
    int i, n;

    RCU_READ_LOCK_GUARD();
    do {
        n = aerostat_device_completions(s->core.device, done, BATCH);
        for (i = 0; i < n; i++) {
            VirtQueueElement *elem =
                (VirtQueueElement *)(uintptr_t)done[i].token;
            unsigned int queue = done[i].queue;

            s->outstanding[queue]--;
            if (done[i].flags & AEROSTAT_COMPLETION_UNSERVED) {
                if (!unserved[queue]) {
                    unserved[queue] = g_ptr_array_new();
                }
                g_ptr_array_add(unserved[queue], elem);
                continue;
            }
            virtqueue_fill(s->queues[queue], elem, done[i].written_bytes,
                           filled[queue]++);
            g_free(elem);
        }
    } while (n == BATCH);

    for (i = 0; i < AEROSTAT_BALLOON_QUEUES; i++) {
        if (filled[i]) {
            trace_aerostat_balloon_complete(i, filled[i]);
            virtqueue_flush(s->queues[i], filled[i]);
            virtio_notify(VIRTIO_DEVICE(s), s->queues[i]);
        }
        while (unserved[i] && unserved[i]->len) {
            VirtQueueElement *elem =
                g_ptr_array_steal_index(unserved[i], unserved[i]->len - 1);

            virtqueue_unpop(s->queues[i], elem, 0);
            g_free(elem);
        }
        g_clear_pointer(&unserved[i], g_ptr_array_unref);
    }
    /* Where the guest does not write its size anywhere, commands tell it. */
    if (!AEROSTAT_BALLOON_GET_CLASS(s)->config_bytes) {
        aerostat_core_announce_actual(&s->core);
    }
}

static void aerostat_balloon_completions(EventNotifier *n)
{
    AerostatBalloon *s = container_of(n, AerostatBalloon, completions);

    if (event_notifier_test_and_clear(n)) {
        aerostat_balloon_collect(s);
        aerostat_balloon_take_hints(s);
    }
}

static void aerostat_balloon_config_changed(EventNotifier *n)
{
    AerostatBalloon *s = container_of(n, AerostatBalloon, config);
    VirtIODevice *vdev = VIRTIO_DEVICE(s);

    if (!event_notifier_test_and_clear(n)) {
        return;
    }
    aerostat_balloon_take_hints(s);
    if (aerostat_device_state(s->core.device) == AEROSTAT_STATE_NEEDS_RESET) {
        virtio_error(vdev, "aerostat-balloon: the device needs a reset");
    } else {
        virtio_notify_config(vdev);
    }
}

static bool aerostat_balloon_start_queue(AerostatBalloon *s, unsigned int i)
{
    struct aerostat_queue_config config = AEROSTAT_QUEUE_CONFIG_INIT;

    config.flags = AEROSTAT_QUEUE_ELEMENT;
    if (aerostat_device_start_queue(s->core.device, i, &config) < 0) {
        aerostat_core_complain(&s->core, "a queue does not start");
        return false;
    }
    return true;
}

/* The driver is ready, or the VM goes on. */
static void aerostat_balloon_start(AerostatBalloon *s)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(s);
    int state = aerostat_device_state(s->core.device);
    int ret = 0;
    unsigned int i;

    if (state != AEROSTAT_STATE_CONFIGURING && state != AEROSTAT_STATE_PAUSED) {
        return;
    }
    aerostat_core_update_inhibit(&s->core);
    for (i = 0; i < AEROSTAT_BALLOON_QUEUES; i++) {
        bool wanted = state == AEROSTAT_STATE_PAUSED ?
                      s->stopped & (1u << i) :
                      virtio_queue_get_desc_addr(vdev, i) != 0;

        if (wanted && !aerostat_balloon_start_queue(s, i)) {
            return;
        }
    }
    s->stopped = 0;
    if (state == AEROSTAT_STATE_PAUSED) {
        ret = aerostat_device_resume(s->core.device);
    } else {
        ret = aerostat_device_activate(s->core.device);
    }
    if (ret < 0) {
        aerostat_core_complain(&s->core, "the device does not start");
        return;
    }
    trace_aerostat_balloon_start(state == AEROSTAT_STATE_PAUSED);
    for (i = 0; i < AEROSTAT_BALLOON_QUEUES; i++) {
        if (virtio_queue_get_desc_addr(vdev, i)) {
            aerostat_balloon_handle_output(vdev, s->queues[i]);
        }
    }
}

/*
 * The VM stops: nothing is in flight when this returns, and no element is out.
 * The library keeps the buffer with statistics until it is asked for news; it
 * goes back to the ring, where the destination of a migration finds it.
 */
static void aerostat_balloon_stop(AerostatBalloon *s)
{
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;
    unsigned int i;

    if (aerostat_device_state(s->core.device) != AEROSTAT_STATE_ACTIVE) {
        return;
    }
    if (aerostat_device_pause(s->core.device) < 0) {
        aerostat_core_complain(&s->core, "the device does not pause");
        return;
    }
    aerostat_balloon_collect(s);
    for (i = 0; i < AEROSTAT_BALLOON_QUEUES; i++) {
        if (s->outstanding[i]) {
            aerostat_device_stop_queue(s->core.device, i, &position);
            s->stopped |= 1u << i;
        }
    }
    aerostat_balloon_collect(s);
    trace_aerostat_balloon_stop(s->stopped);
}

static void aerostat_balloon_set_status(VirtIODevice *vdev, uint8_t status)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);

    if (status & VIRTIO_CONFIG_S_DRIVER_OK) {
        if (vdev->vm_running) {
            aerostat_balloon_start(s);
        } else {
            aerostat_balloon_stop(s);
        }
    }
}

/* Nothing is in flight afterwards, and no ring is written to. */
static void aerostat_balloon_reset(VirtIODevice *vdev)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);
    struct aerostat_completion done[BATCH];
    int i, n;

    aerostat_device_reset(s->core.device);
    do {
        n = aerostat_device_completions(s->core.device, done, BATCH);
        for (i = 0; i < n; i++) {
            VirtQueueElement *elem =
                (VirtQueueElement *)(uintptr_t)done[i].token;

            virtqueue_detach_element(s->queues[done[i].queue], elem, 0);
            g_free(elem);
        }
    } while (n == BATCH);
    memset(s->outstanding, 0, sizeof(s->outstanding));
    s->stopped = 0;
    trace_aerostat_balloon_reset();
}

/* A driver may take a single queue away, and bring it back. */
static void aerostat_balloon_queue_reset(VirtIODevice *vdev, uint32_t queue)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);
    struct aerostat_queue_position position = AEROSTAT_QUEUE_POSITION_INIT;

    aerostat_device_stop_queue(s->core.device, queue, &position);
    s->stopped &= ~(1u << queue);
    aerostat_balloon_collect(s);
}

/* Also called for each queue before DRIVER_OK, which then starts them all. */
static void aerostat_balloon_queue_enable(VirtIODevice *vdev, uint32_t queue)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);

    if (aerostat_device_state(s->core.device) == AEROSTAT_STATE_ACTIVE &&
        aerostat_balloon_start_queue(s, queue)) {
        aerostat_balloon_handle_output(vdev, s->queues[queue]);
    }
}

static uint64_t aerostat_balloon_get_features(VirtIODevice *vdev,
                                              uint64_t features, Error **errp)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);

    return features | AEROSTAT_BALLOON_GET_CLASS(s)->offered(s);
}

static bool aerostat_balloon_new(AerostatBalloon *s, Error **errp)
{
    AerostatBalloonClass *klass = AEROSTAT_BALLOON_GET_CLASS(s);
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;

    if (event_notifier_init(&s->completions, 0) < 0 ||
        event_notifier_init(&s->config, 0) < 0) {
        error_setg_errno(errp, errno, "no eventfd can be had");
        return false;
    }
    offer.kind = klass->kind;
    offer.features = klass->offered(s);
    offer.completion_fd = event_notifier_get_fd(&s->completions);
    offer.config_fd = event_notifier_get_fd(&s->config);
    return aerostat_core_new(&s->core, &offer, errp);
}

static void aerostat_balloon_free(AerostatBalloon *s)
{
    aerostat_core_free(&s->core);
    event_notifier_cleanup(&s->completions);
    event_notifier_cleanup(&s->config);
}

static void aerostat_balloon_realize(DeviceState *dev, Error **errp)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(dev);
    AerostatBalloonClass *klass = AEROSTAT_BALLOON_GET_CLASS(s);
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    unsigned int i;

    if (!aerostat_balloon_new(s, errp)) {
        aerostat_balloon_free(s);
        return;
    }
    virtio_init(vdev, klass->virtio_id, klass->config_bytes);
    if (!aerostat_core_monitor_init(&s->core, errp)) {
        virtio_cleanup(vdev);
        aerostat_balloon_free(s);
        return;
    }
    for (i = 0; i < klass->queues; i++) {
        s->queues[i] = virtio_add_queue(vdev, QUEUE_SIZE,
                                        aerostat_balloon_handle_output);
    }
    aerostat_core_attach(&s->core);
    aerostat_balloon_migration_init(s);
    event_notifier_set_handler(&s->completions, aerostat_balloon_completions);
    event_notifier_set_handler(&s->config, aerostat_balloon_config_changed);
}

static void aerostat_balloon_unrealize(DeviceState *dev)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(dev);
    VirtIODevice *vdev = VIRTIO_DEVICE(dev);
    unsigned int i;

    aerostat_balloon_reset(vdev);
    event_notifier_set_handler(&s->completions, NULL);
    event_notifier_set_handler(&s->config, NULL);
    aerostat_balloon_migration_cleanup(s);
    aerostat_core_monitor_cleanup(&s->core);
    aerostat_core_detach(&s->core);
    aerostat_balloon_free(s);
    for (i = 0; i < AEROSTAT_BALLOON_GET_CLASS(s)->queues; i++) {
        virtio_delete_queue(s->queues[i]);
    }
    virtio_cleanup(vdev);
}

static void aerostat_balloon_instance_init(Object *obj)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(obj);

    qemu_mutex_init(&s->hints_lock);
    aerostat_core_instance_init(&s->core, obj);
}

static void aerostat_balloon_instance_finalize(Object *obj)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(obj);

    aerostat_core_instance_finalize(&s->core);
    qemu_mutex_destroy(&s->hints_lock);
}

static const VMStateDescription vmstate_aerostat_balloon = {
    .name = "aerostat-balloon",
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_VIRTIO_DEVICE,
        VMSTATE_END_OF_LIST()
    },
};

static const Property aerostat_balloon_properties[] = {
    DEFINE_AEROSTAT_CORE_PROPERTIES(AerostatBalloon, core),
};

static void aerostat_balloon_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    VirtioDeviceClass *vdc = VIRTIO_DEVICE_CLASS(klass);

    device_class_set_props(dc, aerostat_balloon_properties);
    dc->vmsd = &vmstate_aerostat_balloon;
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
    vdc->realize = aerostat_balloon_realize;
    vdc->unrealize = aerostat_balloon_unrealize;
    vdc->reset = aerostat_balloon_reset;
    vdc->get_features = aerostat_balloon_get_features;
    vdc->set_status = aerostat_balloon_set_status;
    vdc->queue_reset = aerostat_balloon_queue_reset;
    vdc->queue_enable = aerostat_balloon_queue_enable;
    vdc->post_load = aerostat_balloon_post_load;
    vdc->vmsd = &vmstate_aerostat_balloon_device;
}

static const TypeInfo aerostat_balloon_info = {
    .name = TYPE_AEROSTAT_BALLOON,
    .parent = TYPE_VIRTIO_DEVICE,
    .instance_size = sizeof(AerostatBalloon),
    .instance_init = aerostat_balloon_instance_init,
    .instance_finalize = aerostat_balloon_instance_finalize,
    .abstract = true,
    .class_size = sizeof(AerostatBalloonClass),
    .class_init = aerostat_balloon_class_init,
};

static void aerostat_balloon_register_types(void)
{
    type_register_static(&aerostat_balloon_info);
}

type_init(aerostat_balloon_register_types)
